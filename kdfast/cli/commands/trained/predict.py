"""`kdfast predict`: classify images with a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli import options
from kdfast.cli.commands.trained.export import ImageSize, Trained
from kdfast.cli.output import MODE, note, show
from kdfast.cli.progress import progress

if TYPE_CHECKING:
    from kdfast.deploy.predict import Prediction


def predict(
    run: Trained,
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, folders of image files, or .npy files of uint8 images (N, H, W, 3).", metavar="IMAGES..."
        ),
    ],
    top: Annotated[int, typer.Option("--top", help="Classes to print of each image.", min=1)] = 1,
    model_net: options.ModelNet = None,
    size: ImageSize = None,
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Print the most probable classes of each image, prepared as the data that the network was trained on.

    Images of another size are scaled: the shorter side to that of the network's images, then the central square is cut.
    """
    from kdfast.deploy.predict import predict as predict_images
    from kdfast.deploy.trained import open_trained
    from kdfast.device import resolve_device

    trained = open_trained(run, None if size is None else (size, size))
    names = trained.model.class_names
    found = []
    with progress("predict") as report:
        for prediction in predict_images(trained, images, top=top, device=resolve_device(device), progress=report):
            if MODE.as_json:
                found.append(_facts(prediction, names))
            else:
                note(_describe(prediction, names))
    if MODE.as_json:
        show("", {"model": str(trained.path), "net": trained.model.name, "images": found})


def _facts(prediction: Prediction, names: tuple[str, ...]) -> dict[str, Any]:
    position = {} if prediction.item.index is None else {"index": prediction.item.index}
    classes = [
        {"class": names[label], "label": label, "probability": probability}
        for label, probability in zip(prediction.classes, prediction.probabilities, strict=True)
    ]
    return {"file": prediction.item.file, **position, "predictions": classes}


def _describe(prediction: Prediction, names: tuple[str, ...]) -> str:
    where = prediction.item.file + ("" if prediction.item.index is None else f"[{prediction.item.index}]")
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return f"{where}: {', '.join(f'{names[label]} {100 * probability:.1f}%' for label, probability in pairs)}"
