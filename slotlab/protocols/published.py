"""The protocols. Every fact is from the code that is named; docs/protocols.md has files, settings and known faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featcache.errors import UsageError
from slotlab.protocols.protocol import ANY, Protocol, Terms

ALL = "all"  # every protocol that the store fits

_FG = ("fg_ari", "fg_ari_many", "mbo")
_WITH_CLASSES = (*_FG, "miou", "mbo_class")
_BACKGROUND_COUNTS = ("ari", "fg_ari", "fg_ari_many", "mbo_all", "miou_all")
_CLEVRTEX = ("miou_pairs", "miou_pairs_fg", "miou_true", "msc", "dice", "dice_fg", "ari", "fg_ari", "fg_ari_many")
_MOVI_SLOTS = "11 (A to C), 24 (D, E)"
_WITHOUT_CROWDS = {"crowds": "background", "overlaps": "ignored"}
_WITH_CROWDS = {"crowds": "objects", "overlaps": "ignored"}
_DINOSAUR = "DINOSAUR (Seitzer et al. 2023)"
_SPOT = "SPOT (Kakogeorgiou et al. 2024)"
_VIDEOSAUR = "VideoSAUR (Zadaianchuk et al. 2023)"
_SLOTCONTRAST = "SlotContrast (Manasyan et al. 2025) and what it quotes"
_SMOOTHSA = "SmoothSA and the methods of its tables"

SLOTLAB = Protocol(
    "slotlab",
    "this package",
    {
        ANY: Terms(
            {
                "frame": (*_WITH_CLASSES, "miou_all", "ari"),
                "video": ("fg_ari", "fg_ari_many", "mbo", "miou", "ari"),
            }
        )
    },
)

DINOSAUR = Protocol(
    "dinosaur",
    "amazon-science/object-centric-learning-framework 0a97292",
    {
        "coco": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, read=_WITHOUT_CROWDS, editions=("2017",), data="val2017", slots="7",
            beside=_DINOSAUR,
        ),
        "voc": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, editions=("2012",), data="2012 val", slots="6", beside=_DINOSAUR,
        ),
        "movi": Terms(
            {"frame": _FG},
            input=224, masks=128, editions=("c", "e"), data="C, E: validation", slots="11 (C), 24 (E)",
            beside=_DINOSAUR,
        ),
    },
)  # fmt: skip

SPOT = Protocol(
    "spot",
    "gkakogeorgiou/spot 13c5926",
    {
        "coco": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, read=_WITH_CROWDS, editions=("2017",), data="val2017", slots="7",
            beside=_SPOT,
        ),
        "voc": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, void="background", editions=("2012",), data="2012 val", slots="6",
            beside=_SPOT,
        ),
        "movi": Terms(
            {"frame": (*_FG, "miou")},
            input=224, masks=128, editions=("c", "e"), data="C, E: validation", slots="11 (C), 24 (E)",
            beside=_SPOT,
        ),
    },
)  # fmt: skip

VIDEOSAUR = Protocol(
    "videosaur",
    "martius-lab/videosaur 5d09311",
    {
        "movi": Terms(
            {"video": _FG, "frame": _FG},
            input=224, masks=224, editions=("c", "e"), data="C, E: validation", slots="11 (C), 15 (E)",
            beside=_VIDEOSAUR,
        ),
        "ytvis": Terms(
            {"chunk": _FG, "frame": _FG},
            fit="crop", input=224, masks=224, chunk=6, read=_WITHOUT_CROWDS,
            data="2021: the last 300 of train", slots="7", beside=_VIDEOSAUR,
        ),
        "coco": Terms(
            {"frame": _FG},
            fit="crop", input=224, masks=224, read=_WITHOUT_CROWDS, editions=("2017",), data="val2017", slots="7",
            beside="DINOSAUR on DINOv2, as VideoSAUR's code has it; not the paper of DINOSAUR",
        ),
    },
)  # fmt: skip

SLOTCONTRAST = Protocol(
    "slotcontrast",
    "martius-lab/slotcontrast 17b42b0",
    {
        "movi": Terms(
            {"video": _FG, "frame": _FG},
            input=336, masks=336, editions=("c", "e"), data="C, E: validation", slots="11 (C), 15 (E)",
            beside=_SLOTCONTRAST,
        ),
        "ytvis": Terms(
            {"video": _FG, "frame": _FG},
            fit="crop", input=518, masks=518, read=_WITHOUT_CROWDS, data="2021: the last 300 of train",
            slots="7", beside=_SLOTCONTRAST,
        ),
    },
)  # fmt: skip

GENERA1Z = Protocol(
    "genera1z",
    "Genera1Z/SmoothSA b26d2b7",
    {
        "coco": Terms(
            {"frame": _BACKGROUND_COUNTS},
            fit="crop", input=224, masks=256, void="in predictions",
            read={"truth": "panoptic", "crowds": "objects"}, editions=("2017",), data="panoptic_val2017", slots="7",
            beside=_SMOOTHSA,
        ),
        "voc": Terms(
            {"frame": _BACKGROUND_COUNTS},
            fit="crop", input=224, masks=256, void="in predictions", editions=("2007",),
            data="2007: every SegmentationObject", slots="6",
            beside=_SMOOTHSA,
        ),
        "clevrtex": Terms(
            {"frame": _BACKGROUND_COUNTS},
            fit="crop", input=224, masks=256, editions=("outd",), data="outd", slots="11",
            beside=_SMOOTHSA,
        ),
        "movi": Terms(
            {"video": _BACKGROUND_COUNTS},
            input=224, masks=256, editions=("c", "d"), data="C, D: validation", slots="11 (C), 24 (D)",
            beside="RandSF.Q, SmoothSA: their slots start from the first frame's boxes",
        ),
    },
)  # fmt: skip

CLEVRTEX = Protocol(
    "clevrtex",
    "karazijal/clevrtex fe982ab",
    {
        "clevrtex": Terms(
            {"frame": _CLEVRTEX},
            fit="crop", masks=128, read={"crop": "0.8"}, data="full: test; outd, camo ...: all", slots="11",
            beside="CLEVRTex (Karazija et al. 2021)",
        ),
    },
)  # fmt: skip

DAVIS = Protocol(
    "davis-unsupervised",
    "davisvideochallenge/davis2017-evaluation ac7c43f",
    {
        "davis": Terms(
            {"video": ("j_and_f", "j", "f")},
            fit="squash", masks=480, frame_size="480x854", editions=("2017",),
            data="2017 val, 480p", slots="20 tracks at most",
            beside="DAVIS 2019 unsupervised: VideoCutLER, FlowCut, S2D",
        ),
        ANY: Terms({"video": ("j_and_f", "j", "f")}, slots="20 tracks at most"),
    },
)  # fmt: skip

SAVI = Protocol(
    "savi",
    "google-research/slot-attention-video ba8f15e",
    {
        "movi": Terms(
            {"video": ("fg_ari", "fg_ari_many", "ari")},
            masks=128, editions=("a", "b", "c", "d", "e"), data="A to E: validation", slots=_MOVI_SLOTS,
            beside="SAVi-M, SAVi-L, SAVi++ (README): their slots start from the first frame's boxes",
        ),
    },
)  # fmt: skip

AGNOSTIC = Protocol(
    "class-agnostic",
    "pycocotools COCOeval",
    {ANY: Terms({"frame": ("ap", "ap50", "ar100")}, fit="squash")},
)

PROTOCOLS = {
    each.name: each
    for each in (SLOTLAB, DINOSAUR, SPOT, VIDEOSAUR, SLOTCONTRAST, GENERA1Z, CLEVRTEX, DAVIS, SAVI, AGNOSTIC)
}


@dataclass(frozen=True)
class Asked:
    """A protocol that is asked for."""

    protocol: Protocol
    data: str | None = None  # the data set to take its terms of; None: the one that the store records
    required: bool = True  # otherwise it is left out where the store does not fit


def asked(names: Sequence[str]) -> list[Asked]:
    """Protocols from words ``NAME``, ``NAME:DATA`` or ``all``, each once.

    ``UsageError`` for a name that none has, or data that it has no terms for.
    """
    found: dict[str, Asked] = {}
    for name in names:
        known, _, data = name.partition(":")
        if name == ALL:
            found = {each.name: Asked(each, required=False) for each in PROTOCOLS.values()} | found
            continue
        if known not in PROTOCOLS:
            raise UsageError(f"--protocol {name}: no such protocol; there is: {', '.join(PROTOCOLS)}, {ALL}")
        of = PROTOCOLS[known]
        if data and data not in of.on:
            raise UsageError(f"--protocol {name}: {known} has no terms for {data!r}; it has: {', '.join(of.on)}")
        found[known] = Asked(of, data or None)
    return list(found.values())
