"""Whole data sets in the files of their authors: CIFAR, SVHN, MNIST, STL-10, .npz."""
