"""A part of labelled images, the same in every run: few labels."""
import argparse
import re

import numpy as np

from image_lists import ImageList

FORM = re.compile(r'(\d+(?:\.\d+)?)%|(\d+)-per-class')


def parse(text: str) -> str:
    """A share like 1% or 5-per-class, for argparse."""
    match = FORM.fullmatch(text)
    if not match or not 0 < float(match.group(1) or match.group(2)) <= (100 if match.group(1) else
                                                                        2**31):
        raise argparse.ArgumentTypeError(f'{text} is no share like 1%, 10% or 5-per-class')
    return text


def choose(images: ImageList, share: str) -> ImageList:
    """Of each class the first images of an order that depends on nothing but the class's number and
    size: 1 % of them (rounded, at least one), or so many, or all if there are fewer. So 1% is a
    part of 10%."""
    percent, per_class = FORM.fullmatch(share).groups()
    chosen = []
    for label in range(len(images.classes)):
        members = np.flatnonzero(images.labels == label)
        order = np.random.RandomState([label, len(members)]).permutation(members)
        number = int(per_class) if per_class else max(1, round(len(members) * float(percent) / 100))
        chosen.append(order[:number])
    indices = np.sort(np.concatenate(chosen))
    return images._replace(files=images.files.take(indices), labels=images.labels[indices])
