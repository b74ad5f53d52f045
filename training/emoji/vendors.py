"""The vendors of the demo data set: which package, which licence, whose credit, and what it may be used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from training.emoji.packages import Pin

EMOJIBASE = Pin(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
EMOJIBASE_LICENCE = "MIT"

# Older Unicode names that no short-code table lists.
_OLD_NAMES = {
    "anticlockwise-arrows-button": "counterclockwise arrows button",
    "division-sign": "divide",
    "minus-sign": "minus",
    "multiplication-sign": "multiply",
    "plus-sign": "plus",
    "exclamation-mark": "red exclamation mark",
    "keycap-pound": "keycap: #",
    "laptop-computer": "laptop",
    "school-backpack": "backpack",
    "man-in-suit-levitating": "person in suit levitating",
    "smiling-cat-face-with-heart-eyes": "smiling cat with heart-eyes",
    "up-text-button": "UP! button",
    "flag-for-turkey": "flag: Türkiye",
    "flag-for-black-flag": "black flag",
    "flag-for-white-flag": "white flag",
    "flag-for-chequered-flag": "chequered flag",
    "flag-for-crossed-flags": "crossed flags",
    "flag-for-rainbow-flag": "rainbow flag",
    "flag-for-triangular-flag": "triangular flag",
    **{
        f"digit-{word}": f"keycap: {digit}"
        for digit, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
    },
}


@dataclass(frozen=True)
class Vendor:
    """One vendor's art.

    Attributes:
        key: short name, also the file name in the built data set.
        licence: SPDX id that the package must state.
        credit: the line that NOTICE carries.
        role: ``train``, or ``test`` for a vendor that is never trained on and never chosen on.
        kind: ``iconify`` (an icons.json of SVG bodies), ``files`` (pictures named by code points), ``font`` (WOFF files
            of outlines) or ``flags`` (icons.json named by country code).
        folder: where the package has its ``files`` or ``font`` files; for a font the start of their names, too.
        exact: match an icon only when its name is an emoji's label (general icon sets).
        styles: keys of `training.emoji.render.STYLES` to draw it in; the first is the art as it is (a font's is
            ``line``).
    """

    key: str
    pin: Pin
    licence: str
    credit: str
    role: Literal["train", "test"] = "train"
    kind: Literal["iconify", "files", "font", "flags"] = "iconify"
    folder: str = "assets/"
    exact: bool = False
    styles: tuple[str, ...] = ("plain",)
    renamed: Mapping[str, str] = field(default_factory=lambda: _OLD_NAMES)


def _iconify(name: str, version: str, integrity: str) -> Pin:
    return Pin(f"@iconify-json/{name}", version, f"sha512-{integrity}")


_REDRAWN = ("plain", "outlined", "line")

VENDORS: dict[str, Vendor] = {
    vendor.key: vendor
    for vendor in (
        Vendor(
            "noto",
            _iconify(
                "noto",
                "1.2.9",
                "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            ),
            "Apache-2.0",
            "Noto Emoji, copyright Google LLC",
            styles=_REDRAWN,
        ),
        Vendor(
            "noto-v1",
            _iconify(
                "noto-v1",
                "1.2.5",
                "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
            ),
            "Apache-2.0",
            "Noto Emoji (first design), copyright Google LLC",
            styles=_REDRAWN,
        ),
        Vendor(
            "twemoji",
            _iconify(
                "twemoji",
                "1.2.5",
                "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            ),
            "CC-BY-4.0",
            "Twemoji, copyright Twitter, Inc. and other contributors",
            styles=_REDRAWN,
        ),
        Vendor(
            "fluent-flat",
            _iconify(
                "fluent-emoji-flat",
                "1.2.6",
                "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            ),
            "MIT",
            "Fluent Emoji (flat), copyright Microsoft Corporation",
            styles=_REDRAWN,
        ),
        Vendor(
            "fluent-color",
            _iconify(
                "fluent-emoji",
                "1.2.7",
                "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
            ),
            "MIT",
            "Fluent Emoji (colour), copyright Microsoft Corporation",
        ),
        Vendor(
            "fluent-high-contrast",
            _iconify(
                "fluent-emoji-high-contrast",
                "1.2.6",
                "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
            ),
            "MIT",
            "Fluent Emoji (high contrast), copyright Microsoft Corporation",
        ),
        Vendor(
            "fxemoji",
            _iconify(
                "fxemoji",
                "1.2.2",
                "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
            ),
            "Apache-2.0",
            "FxEmoji, copyright Mozilla Foundation",
            styles=_REDRAWN,
        ),
        Vendor(
            "streamline",
            _iconify(
                "streamline-emojis",
                "1.2.4",
                "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
            ),
            "CC-BY-4.0",
            "Streamline Emojis by Streamline (streamlinehq.com)",
        ),
        Vendor(
            "circle-flags",
            _iconify(
                "circle-flags",
                "1.2.11",
                "vrx2btOkTQ4/P75ElEDnjXShmNTwInXuhhpIQQ6U6YUTdxfWyvm/4ijNG8FX8iWFr+sqqQRCvXpm2RfRtjVXfg==",
            ),
            "MIT",
            "circle-flags by HatScripts",
            kind="flags",
        ),
        Vendor(
            "phosphor",
            _iconify(
                "ph",
                "1.2.2",
                "PgkEZNtqa8hBGjHXQa4pMwZa93hmfu8FUSjs/nv4oUU6yLsgv+gh9nu28Kqi8Fz9CCVu4hj1MZs9/60J57IzFw==",
            ),
            "MIT",
            "Phosphor Icons",
            exact=True,
        ),
        Vendor(
            "tabler",
            _iconify(
                "tabler",
                "1.2.41",
                "GHg+H/cnr0anaCoV383JONiOMxZQOdojWYNLgL3x0fRE07YW7c+AHiYmIhXet//oq26T830qitdP7l43ojiCXw==",
            ),
            "MIT",
            "Tabler Icons by Paweł Kuna",
            exact=True,
        ),
        Vendor(
            "lucide",
            _iconify(
                "lucide",
                "1.2.137",
                "uKz1+tFbv1RFX/mJQNksdnyKJijNfRGSNnxfiyKtr+dLNfA3ERph+IgpXClKGOlV/5GsZwLv2jgJXQ/bjF/JAg==",
            ),
            "ISC",
            "Lucide Icons, copyright Lucide Contributors",
            exact=True,
        ),
        Vendor(
            "material-design-icons",
            _iconify(
                "mdi",
                "1.2.3",
                "O3cLwbDOK7NNDf2ihaQOH5F9JglnulNDFV7WprU2dSoZu3h3cWH//h74uQAB87brHmvFVxIOkuBX2sZSzYhScg==",
            ),
            "Apache-2.0",
            "Material Design Icons by Pictogrammers",
            exact=True,
        ),
        Vendor(
            "icon-park",
            _iconify(
                "icon-park",
                "1.2.4",
                "S8fVl49LG/M9hvwb7ruFGInK21AHMv3IJehOJRJgXPLE39OOCP3wbfTWjro/XzsjxRwdvX/lYdGetFOZI0TaJQ==",
            ),
            "Apache-2.0",
            "IconPark, copyright ByteDance",
            exact=True,
        ),
        Vendor(
            "game-icons",
            _iconify(
                "game-icons",
                "1.2.4",
                "/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
            ),
            "CC-BY-3.0",
            "Game-icons.net by its contributors (Lorc, Delapouite and others)",
            exact=True,
        ),
        Vendor(
            "emojione",
            _iconify(
                "emojione",
                "1.2.3",
                "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
            ),
            "CC-BY-4.0",
            "EmojiOne 2 / EmojiTwo, copyright EmojiOne and EmojiTwo contributors",
            role="test",
        ),
        Vendor(
            "openmoji",
            _iconify(
                "openmoji",
                "1.2.29",
                "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
            ),
            "CC-BY-SA-4.0",
            "OpenMoji, the open-source emoji and icon project (openmoji.org)",
            role="test",
        ),
        Vendor(
            "fluent-3d",
            Pin(
                "@lobehub/fluent-emoji-3d",
                "1.1.0",
                "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
            ),
            "MIT",
            "Fluent Emoji (3D), copyright Microsoft Corporation; packaged by LobeHub",
            kind="files",
        ),
        Vendor(
            "noto-oreo",
            Pin(
                "emoji-datasource-google",
                "4.0.3",
                "sha512-0FsMrWDx/JN33oNTT/jyItog8An+KUYvjQitWO+3A0BGEq2nsdpNvGqgx9jl0e70GuY7Xe+w6vRjbycvIl1CNQ==",
            ),
            "MIT",
            "Noto Emoji (Android 8 design), copyright The Android Open Source Project, Apache-2.0; in emoji-datasource",
            kind="files",
            folder="img/google/64/",
        ),
        Vendor(
            "noto-monochrome",
            Pin(
                "@fontsource/noto-emoji",
                "5.3.2",
                "sha512-N9CSzXJB04AVWYvFbuBgL2Dq964Zo91th/uOu/QLSuWBYuL9FWXGcEo6ZNwc/IJ7vmpm8KHaIKD7jF8pYm4taw==",
            ),
            "OFL-1.1",
            "Noto Emoji (font of outlines), copyright Google LLC; packaged by Fontsource",
            kind="font",
            folder="files/noto-emoji-",
            styles=("line",),
        ),
    )
}
