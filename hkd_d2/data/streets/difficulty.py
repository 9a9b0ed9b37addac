"""Difficulty of the streets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """Settings that make the task easy or hard.

    Lengths in pixels refer to a picture 192 pixels high and scale with the height.
    """

    people: float = 4.5  # mean number of single pedestrians in a picture that has any
    empty: float = 0.08  # share of the pictures without any person
    min_height: float = 13.0  # heights of people are log-uniform between these two
    max_height: float = 150.0
    tall: float = 0.35  # share of people drawn again from 50 pixels up
    companion: float = 0.3  # chance of a second person walking beside one
    occluded: float = 0.25  # chance of something put in front of a person on purpose
    low_contrast: float = 0.1  # share of clothes in the colour of what is behind them
    clutter: float = 4.0  # mean number of things that could be taken for a person
    cars: float = 1.5  # mean number of cars
    noise: float = 5.0  # largest standard deviation of the sensor noise, grey levels
    blur: float = 0.7  # largest standard deviation of the blur, pixels
    dim: float = 0.2  # share of dusk, fog and other pictures of little contrast
