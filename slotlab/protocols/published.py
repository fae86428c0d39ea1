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
            fit="crop", input=224, masks=320, read={"crowds": "background"}, data="val2017", slots="7",
            beside="DINOSAUR (Seitzer et al. 2023)",
        ),
        "voc": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, data="2012 val", slots="6", beside="DINOSAUR (Seitzer et al. 2023)",
        ),
        "movi": Terms(
            {"frame": _FG},
            input=224, masks=128, data="C, E: validation", slots="11 (C), 24 (E)",
            beside="DINOSAUR (Seitzer et al. 2023)",
        ),
    },
)  # fmt: skip

SPOT = Protocol(
    "spot",
    "gkakogeorgiou/spot 13c5926",
    {
        "coco": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, read={"crowds": "objects"}, data="val2017", slots="7",
            beside="SPOT (Kakogeorgiou et al. 2024)",
        ),
        "voc": Terms(
            {"frame": _WITH_CLASSES},
            fit="crop", input=224, masks=320, void="background", data="2012 val", slots="6",
            beside="SPOT (Kakogeorgiou et al. 2024)",
        ),
        "movi": Terms(
            {"frame": (*_FG, "miou")},
            input=224, masks=128, data="C, E: validation", slots="11 (C), 24 (E)",
            beside="SPOT (Kakogeorgiou et al. 2024)",
        ),
    },
)  # fmt: skip

VIDEOSAUR = Protocol(
    "videosaur",
    "martius-lab/videosaur 5d09311",
    {
        "movi": Terms(
            {"video": _FG, "frame": _FG},
            input=224, masks=224, data="C, E: validation", slots="11 (C), 15 (E)",
            beside="VideoSAUR (Zadaianchuk et al. 2023)",
        ),
        "ytvis": Terms(
            {"chunk": _FG, "frame": _FG},
            fit="crop", input=224, masks=224, chunk=6, read={"crowds": "background"},
            data="2021: the last 300 of train", slots="7", beside="VideoSAUR (Zadaianchuk et al. 2023)",
        ),
        "coco": Terms(
            {"frame": _FG},
            fit="crop", input=224, masks=224, read={"crowds": "background"}, data="val2017", slots="7",
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
            input=336, masks=336, data="C, E: validation", slots="11 (C), 15 (E)",
            beside="SlotContrast (Manasyan et al. 2025) and what it quotes",
        ),
        "ytvis": Terms(
            {"video": _FG, "frame": _FG},
            fit="crop", input=518, masks=518, read={"crowds": "background"}, data="2021: the last 300 of train",
            slots="7", beside="SlotContrast (Manasyan et al. 2025) and what it quotes",
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
            read={"truth": "panoptic", "crowds": "objects"}, data="panoptic_val2017", slots="7",
            beside="SmoothSA, MetaSlot, DIAS and the others of its tables",
        ),
        "voc": Terms(
            {"frame": _BACKGROUND_COUNTS},
            fit="crop", input=224, masks=256, void="in predictions", data="2007: every SegmentationObject", slots="6",
            beside="SmoothSA, MetaSlot, DIAS and the others of its tables",
        ),
        "clevrtex": Terms(
            {"frame": _BACKGROUND_COUNTS},
            fit="crop", input=224, masks=256, data="outd", slots="11",
            beside="SmoothSA, MetaSlot, DIAS and the others of its tables",
        ),
        "movi": Terms(
            {"video": _BACKGROUND_COUNTS},
            input=224, masks=256, data="C, D: validation", slots="11 (C), 24 (D)",
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
            fit="squash", masks=480, data="2017 val, 480p", slots="20 tracks at most",
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
            masks=128, data="A to E: validation", slots=_MOVI_SLOTS,
            beside="SAVi-M, SAVi-L, SAVi++ (README): their slots start from the first frame's boxes",
        ),
    },
)  # fmt: skip

AGNOSTIC = Protocol(
    "class-agnostic",
    "cocodataset/cocoapi, as pycocotools",
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
