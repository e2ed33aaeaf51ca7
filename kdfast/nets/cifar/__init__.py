"""Networks for small images, as the literature of knowledge distillation uses them."""
