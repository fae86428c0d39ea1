"""CLEVRER (Yi et al., ICLR 2020), with the masks that come with it.

::

    CLEVRER/
      video_train/video_00000-01000/video_00000.mp4 ...    video_validation/... video_test/..., or other folders
      derender_proposals/proposal_00000.json ...           optional, or processed_proposals/sim_00000.json: run lengths

Videos 0 to 9999 are the split ``train``, 10000 to 14999 ``val``, further ones ``test``. The masks are those of a
detector. It names no object from frame to frame, but no two objects of a video have one colour, material and shape:
what has the same in two frames is one object, numbered by first appearance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources import clips
from featcache.sources.fingerprint import file_digest
from featcache.sources.listed import Item, ListedSource, Truth
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.regions import OVERLAPS, Canvas, decode_region, read_json, require_coco, require_few
from featcache.sources.video import Instance, Size

FOLDERS = ("video_train", "video_validation", "video_test")
PROPOSALS = ("derender_proposals", "processed_proposals")
FILE = re.compile(r"(?:proposal|sim)_(\d{5})\.json")
VIDEO = re.compile(r"video_(\d{5})\.mp4")
STARTS = {"train": 0, "val": 10_000, "test": 15_000}
LABELS = ("color", "material", "shape")


@dataclass(frozen=True)
class ClevrerItem(Item):
    """One video."""

    proposals: Path | None = None  # the file of its masks


class ClevrerSource(ListedSource[ClevrerItem]):
    """CLEVRER's videos. Pixels of two objects are ignored."""

    def __init__(self, place: Place, reading: Reading) -> None:
        videos = {int(m[1]): path for path in place.path.rglob("video_*.mp4") if (m := VIDEO.fullmatch(path.name))}
        if not videos:
            raise DataError(f"{place.path}: no video_00000.mp4 or its like below it; give CLEVRER's folder")
        files = [path for name in PROPOSALS for path in (place.path / name).glob("*.json")]
        proposals = {int(m[1]): path for path in files if (m := FILE.fullmatch(path.name))}
        if proposals:
            require_coco()
        self._videos: dict[str, list[ClevrerItem]] = {}
        for number, path in sorted(videos.items()):
            split = [name for name, start in STARTS.items() if number >= start][-1]
            of = proposals.get(number)
            self._videos.setdefault(split, []).append(ClevrerItem(path.stem, (path,), (), (of is not None,), None, of))
        super().__init__(place, reading, tuple(self._videos))

    def find(self, split: str) -> Sequence[ClevrerItem]:
        return self._videos[split]

    def lengths(self, split: str) -> Sequence[int]:
        return tuple(clips.count_frames(item.frames[0]) for item in self.items(split))

    def size(self, split: str, index: int) -> Size:
        return clips.frame_size(self.item(split, index).frames[0])

    def frames(self, item: ClevrerItem, shrink: float = 1.0) -> npt.NDArray[np.uint8]:
        return clips.read_frames(item.frames[0])

    def written(self, item: ClevrerItem) -> Iterator[bytes | str]:
        if item.proposals:
            yield file_digest(item.proposals)

    def truth(self, split: str, item: ClevrerItem, shape: tuple[int, int, int]) -> Truth:
        assert item.proposals is not None
        numbers, ignore = np.zeros(shape, np.uint8), np.zeros(shape, bool)
        labelled = np.zeros(shape[0], bool)
        known: dict[tuple[Any, ...], int] = {}
        try:
            for frame in read_json(item.proposals)["frames"]:
                place = int(frame["frame_index"])
                if not 0 <= place < shape[0]:
                    raise DataError(
                        f"{item.proposals}: frame {place} of a video of {shape[0]}; copy both of one data set"
                    )
                canvas = Canvas(shape[1:], OVERLAPS[0])
                for each, name in zip(frame["objects"], _names(frame["objects"]), strict=True):
                    number = known.setdefault(name, len(known) + 1)
                    require_few(number, str(item.proposals))
                    canvas.lay(number, decode_region(each["mask"], shape[1:], f"{item.proposals}: frame {place}"))
                (numbers[place], ignore[place]), labelled[place] = canvas.finish(), True
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{item.proposals}: no frames with masks in it ({error!r}); download it again") from error
        objects = [Instance(color=name[0], material=name[1], shape=name[2]) for name in known]
        return Truth(numbers, objects, ignore, labelled)

    def remarks(self, split: str) -> Sequence[str]:
        items = self.items(split)
        missing = [item for item in items if not item.proposals]
        lines = []
        if missing and len(missing) < len(items):
            lines.append(f"{missing[0].frames[0]}: no masks, as {len(missing)} of {len(items)} videos; not scored")
        if len(missing) < len(items):
            lines.append(f"{self.location}: CLEVRER's masks are a detector's, not the renderer's")
        return lines


def _names(objects: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """What tells each object of a frame from the others: its labels, and a count where a detector found them twice."""
    seen: Counter[tuple[str, ...]] = Counter()
    for each in objects:
        labels = tuple(str(each[name]) for name in LABELS)
        yield (*labels, seen[labels])
        seen[labels] += 1


LAYOUT = Layout("clevrer", "CLEVRER", lambda path: any((path / name).is_dir() for name in FOLDERS), ClevrerSource)
