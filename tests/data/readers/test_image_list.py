import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.folders import image_list
from kdfast.data.readers.folders.image_list import ORDERS, ImageLister
from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, DataWarning, UsageError

NESTED = ("1.png", "b/1.png", "b/z/0.png", "b-2/0.png", "b.png", "c/0.png", "b/a.png", "0/9.png", "é/1.jfif", "z.JPG")


def place(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder: Path, order="path") -> list[str]:
    return [os.path.relpath(path, folder) for path in ImageLister(folder, order).list_images(folder)]


def imagefolder_order(folder: Path) -> list[str]:
    """Return the order of torchvision's ImageFolder for one class, its loop written again."""
    found = []
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [os.path.relpath(os.path.join(root, name), folder) for name in sorted(names)]
    return found


def test_paths_are_compared_name_by_name(tmp_path):
    place(tmp_path, *NESTED)
    assert listed(tmp_path) == sorted(NESTED, key=lambda name: name.split("/"))


def test_imagefolder_order_is_that_of_torchvision(tmp_path):
    place(tmp_path, *NESTED)
    assert listed(tmp_path, "imagefolder") == imagefolder_order(tmp_path) != listed(tmp_path)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names", [("0.png", "1.png"), ("images/0.png", "images/1.png"), ("a/1.png", "b/0.png")])
def test_both_orders_agree_where_no_folder_has_files_beside_folders(tmp_path, names, order):
    place(tmp_path, *names)
    assert listed(tmp_path, order) == sorted(names) == imagefolder_order(tmp_path)


def nested_folder(tmp_path, image_folder) -> Path:
    """Return data whose class `ant` has the same images as a flat one, two of them in a folder."""
    root = image_folder(tmp_path)
    (root / "train/ant/1").mkdir()
    for number in (0, 1):
        (root / f"train/ant/{number}.png").rename(root / f"train/ant/1/{number}.png")
    return root


def test_the_order_is_part_of_the_fingerprint(tmp_path, image_folder):
    sources = {order: open_source(nested_folder(tmp_path / order, image_folder), order=order) for order in ORDERS}
    moved = sources["path"].train.read([2, 3, 0, 1, 4, 5, 6, 7])
    assert np.array_equal(sources["imagefolder"].train.read(range(8)), moved)
    assert sources["path"].fingerprint != sources["imagefolder"].fingerprint
    assert np.array_equal(sources["path"].train.labels, sources["imagefolder"].train.labels)


def test_the_order_of_a_flat_folder_does_not_matter(tmp_path, image_folder):
    root = image_folder(tmp_path)
    assert open_source(root).fingerprint == open_source(root, order="imagefolder").fingerprint


def test_relabelled_images_have_the_order_they_were_made_with(tmp_path, image_folder):
    from kdfast.data.readers.relabel import write_flipped

    root = nested_folder(tmp_path / "data", image_folder)
    write_flipped(open_source(root, order="imagefolder"), str(root), tmp_path / "flipped", share=0.2, seed=0)
    assert len(open_source(tmp_path / "flipped", order="imagefolder").train) == 8
    with pytest.raises(DataError, match="has changed since"):
        open_source(tmp_path / "flipped")


@pytest.mark.parametrize(
    ("data", "order", "message"),
    [("digits", "imagefolder", "has an order of its own: omit it"), ("digits", "imagefolders", "did you mean")],
)
def test_rejects_orders_that_do_not_fit(data, order, message):
    with pytest.raises(UsageError, match=message):
        open_source(data, order=order)


def test_links_to_folders_are_followed_as_by_imagefolder(tmp_path):
    place(tmp_path / "elsewhere", "x/0.png", "1.png")
    place(tmp_path / "class", "0.png", "own/5.png")
    (tmp_path / "class/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "class/again").symlink_to(tmp_path / "class/own")
    assert listed(tmp_path / "class") == [
        "0.png",
        "again/5.png",
        "linked/1.png",
        "linked/x/0.png",
        "own/5.png",
    ]
    assert listed(tmp_path / "class", "imagefolder") == imagefolder_order(tmp_path / "class")


@pytest.mark.parametrize("target", [".", "..", "inner", "../class/inner"])
def test_links_in_circles_end_and_are_counted(tmp_path, target):
    place(tmp_path / "class", "0.png", "inner/1.png")
    (tmp_path / "class/inner/circle").symlink_to(tmp_path / "class" / target)
    lister = ImageLister(tmp_path, "path")
    assert [Path(path).name for path in lister.list_images(tmp_path / "class")][:2] == ["0.png", "1.png"]
    assert "link to folders that contain them" in lister.notes()[0]


@pytest.mark.parametrize("target", ["train", ".", "train/ant"])
def test_a_link_to_a_folder_above_adds_no_image_of_another_class(tmp_path, target):
    place(tmp_path / "data/train/ant", "0.png")
    place(tmp_path / "data/train/bee", "1.png")
    root = tmp_path / "data/train"
    for place_of_link in (root / "ant/up", root / "up"):
        place_of_link.symlink_to(tmp_path / "data" / target)
    lister = ImageLister(root, "path")
    assert lister.class_folders() == (("ant", "bee", "up") if target == "train/ant" else ("ant", "bee"))
    assert [Path(path).name for path in lister.list_images(root / "ant")] == ["0.png"]
    assert [Path(path).name for path in lister.list_images(root / "bee")] == ["1.png"]
    assert "folders that contain them, such as" in lister.notes()[0]


def test_links_in_too_many_ways_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(image_list, "_MAX_REPEATS", 200)
    for name in "abcdefgh":
        place(tmp_path / name, "0.png")
        for other in "abcdefgh":
            if other != name:
                (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(DataError, match="in too many ways"):
        listed(tmp_path)


@pytest.mark.parametrize("target", ["itself", "absent"])
def test_links_to_nothing_are_counted(tmp_path, target):
    (tmp_path / "itself").symlink_to(tmp_path / target)
    place(tmp_path, "0.png")
    lister = ImageLister(tmp_path, "path")
    assert len(lister.list_images(tmp_path)) == 1
    assert "1 without any suffix" in lister.notes()[0]


def test_deep_folders_are_read_to_the_end(tmp_path):
    deep = str(tmp_path)
    for _ in range(1100):  # more than Python's limit on recursion
        deep += "/a"
        os.mkdir(deep)
    Path(deep, "0.png").touch()
    try:
        assert len(listed(tmp_path)) == 1
    finally:
        os.remove(f"{deep}/0.png")
        os.removedirs(deep)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("a.gif", "b.TXT", "c", "d.txt"), "skipped 4 files without the suffix of an image: 2 .txt, 1 .gif, 1 without"),
        ((".0.png", "x/._1.jpg", "note"), "skipped 2 images in hidden files and folders, such as "),
        ((".ipynb_checkpoints/0-checkpoint.png",), "skipped 1 image in hidden files and folders, such as "),
        ((".thumbnails/x/y.webp", ".thumbnails/z.txt"), "skipped 1 image in hidden files and folders, such as "),
        ((".DS_Store", ".git/config"), None),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, names, note):
    place(tmp_path, "0.png", *names)
    lister = ImageLister(tmp_path, "path")
    assert lister.list_images(tmp_path) == [str(tmp_path / "0.png")]
    assert (note is None and not lister.notes()) or any(note in text for text in lister.notes())


def test_opening_says_what_is_left_out(tmp_path, image_folder):
    root = image_folder(tmp_path)
    place(root / "train", "loose.png", "ant/.ipynb_checkpoints/0-checkpoint.png", "bee/x.svg", ".trash/9.png")
    with pytest.warns(DataWarning) as caught:
        source = open_source(root)
    assert len(source.train) == 8
    assert source.notes == tuple(str(warning.message) for warning in caught)
    assert [note.partition(": ")[2].partition(",")[0] for note in source.notes] == [
        "skipped 1 file without the suffix of an image: 1 .svg",
        "skipped 2 images in hidden files and folders",
        "skipped 1 image outside of class folders",
    ]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    place(tmp_path, "0.png", "closed/1.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list .*closed: Permission denied"):
        listed(tmp_path)


def test_takes_jfif_and_avif(tmp_path, image_folder):
    features = pytest.importorskip("PIL.features")
    root = image_folder(tmp_path)
    image = Image.new("RGB", (16, 16), (250, 0, 0))
    image.save(root / "train/ant/8.jfif", format="JPEG")
    if features.check("avif"):
        image.save(root / "train/ant/9.avif")
    assert len(open_source(root).train) == 8 + 1 + features.check("avif")
