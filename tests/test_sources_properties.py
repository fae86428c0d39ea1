"""A mask lies where its object is: whatever the container, the orientation, and the form of the mask."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from featcache.sources import open_source
from tests.media import MATRICES, copied, ffmpeg_frames, needs_ffmpeg, save_movie, set_display_matrix

HEIGHT, WIDTH = 48, 64
RED = np.array([250, 10, 10], np.uint8)

# The form of a mask with one object: what Pillow is to save for numbers (H, W) of 0 and 1.
FORMS = {
    "numbers": lambda numbers: Image.fromarray(numbers),
    "black and white": lambda numbers: Image.fromarray(numbers * np.uint8(255)),
    "one bit": lambda numbers: Image.fromarray(numbers.astype(bool)),
    "palette": lambda numbers: _palette(numbers),
    "equal channels": lambda numbers: Image.fromarray(np.stack([numbers] * 3, -1)),
    "constant alpha": lambda numbers: Image.merge(
        "LA", [Image.fromarray(numbers), Image.new("L", _size(numbers), 255)]
    ),
    "sixteen bits": lambda numbers: Image.fromarray(numbers.astype(np.uint16)),
}
IMAGES = {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}
VIDEOS = {
    **dict.fromkeys(("mp4", "mov", "mkv", "avi"), ("mpeg4", {"qmin": "1", "qmax": "1"})),
    "webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "1"}),
}
WITHOUT_MATRIX = ("avi",)  # containers that hold none: a picture lies as the sensor gave it
AREAS = st.builds(
    lambda top, left, height, width: (slice(top, top + height), slice(left, left + width)),
    *(st.integers(1, 4).map(lambda n: 8 * n) for _ in range(2)),  # on the blocks of the codecs
    *(st.integers(1, 2).map(lambda n: 8 * n) for _ in range(2)),
)


def _size(numbers: np.ndarray) -> tuple[int, int]:
    return numbers.shape[1], numbers.shape[0]


def _palette(numbers: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As Pillow turns it."""
    image = Image.fromarray(pixels)
    image.info["exif"] = _exif(orientation)
    return np.asarray(ImageOps.exif_transpose(image))


def _overlap(frame: np.ndarray, mask: np.ndarray) -> float:
    """IoU of what is red in a frame with object 1 of its mask."""
    red = (np.abs(frame.astype(int) - RED) < 60).all(-1)
    return float((red & (mask == 1)).sum() / (red | (mask == 1)).sum())


@pytest.mark.slow
@needs_ffmpeg
@settings(max_examples=80, deadline=None)
@given(
    container=st.sampled_from([*IMAGES, *VIDEOS]),
    orientation=st.sampled_from(range(1, 9)),
    form=st.sampled_from([*FORMS]),
    tagged=st.booleans(),
    area=AREAS,
)
def test_a_mask_lies_where_its_object_is(
    container: str, orientation: int, form: str, tagged: bool, area: tuple[slice, slice]
) -> None:
    """Masks are as the sensor gave them, with the tag of the photo, or upright without one; a video's are upright."""
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[area] = 1
    sensor = np.where(numbers[..., None] == 1, RED, np.uint8(90)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "masks").mkdir()
        if container in VIDEOS:
            codec, options = VIDEOS[container]
            plain = container in WITHOUT_MATRIX
            clip = save_movie(folder / f"a.{container if plain else 'mp4'}", codec, sensor[None], **options)
            if plain:
                orientation = 1
            else:
                set_display_matrix(clip, *MATRICES[orientation])
            right = _upright(numbers, orientation)
            (folder / "masks" / "a").mkdir()
            FORMS[form](right).save(folder / "masks" / "a" / "0.png")
            frame = ffmpeg_frames(clip, *right.shape)[0]
            if clip.suffix != f".{container}":
                copied(clip, folder / f"a.{container}")
                clip.unlink()
        else:
            path = folder / f"a.{container}"
            Image.fromarray(sensor).save(path, exif=_exif(orientation), **IMAGES[container])
            right = _upright(numbers, orientation)
            if tagged:
                FORMS[form](numbers).save(folder / "masks" / "a.png", exif=_exif(orientation))
            else:
                FORMS[form](right).save(folder / "masks" / "a.png")
            with Image.open(path) as image:
                frame = np.asarray(ImageOps.exif_transpose(image))
        video = open_source(folder).read("train", 0)
    np.testing.assert_array_equal(video.frames[0], frame)
    np.testing.assert_array_equal(video.segmentations[0], right)
    assert len(video.instances) == 1
    assert _overlap(video.frames[0], video.segmentations[0]) > 0.95
