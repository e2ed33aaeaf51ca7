"""What a view may do to an image beside a shift: random resized crops, and the operations of augmentation policies."""
