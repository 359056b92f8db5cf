"""What the pictures show: concepts, their words, which of them are twins, and which split a concept belongs to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

GROUPS = {
    0: "smileys",
    1: "people",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}
"""emojibase's groups. Skin tones (2) and flags (9) are left out: flags are the same picture everywhere."""

SPLITS = {"learn": 64, "prompts": 16, "validation": 10, "test": 10}
"""Shares in percent of the base concepts; the table in README.md says who may see which."""


@dataclass(frozen=True)
class Concept:
    """One thing to draw.

    Attributes:
        code: code points in hexadecimal, joined by "-", without the sign that asks for colour.
        label: what a person would call it, in lower case.
        tags: related words, in the order of the source.
        group: one of the values of `GROUPS`.
        base: name of the base concept; twins (gender, age, direction, colour, hour) share it.
        split: one of the keys of `SPLITS`; twins are in the same.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    base: str
    split: str


def normal_code(text: str) -> str:
    """Brings a name like `1F3E0-FE0F` to the form `1f3e0`."""
    return "-".join(part.zfill(4) for part in text.lower().split("-") if part != "fe0f")


def read_concepts(words: Path) -> list[Concept]:
    """Reads all concepts from an unpacked emojibase-data, in Unicode's order."""
    entries = json.loads((words / "en" / "data.json").read_text(encoding="utf-8"))
    entries = sorted((e for e in entries if e.get("group") in GROUPS), key=lambda e: e["order"])
    concepts = []
    for entry in entries:
        label = clean(entry["label"])
        base = base_concept(label)
        tags = tuple(dict.fromkeys(t for t in map(clean, entry.get("tags", ())) if t and t != label))
        concepts.append(
            Concept(normal_code(entry["hexcode"]), label, tags, GROUPS[entry["group"]], base, split_of(base))
        )
    return concepts


def load_concepts(data: Path) -> list[Concept]:
    """Reads the concepts of a built data set, in Unicode's order."""
    rows = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    return [Concept(**{**row, "tags": tuple(row["tags"])}) for row in rows]


def clean(text: str) -> str:
    """Lower case, plain quotes, single spaces: what a person types."""
    text = text.lower().replace("’", "'").translate({ord(c): None for c in '“”"!'})
    return re.sub(r"\s+", " ", text).strip()


COLOURS = "red|pink|orange|yellow|green|blue|light blue|purple|brown|black|grey|white"
PEOPLE = r"\b(older person|old man|old woman|person|man|woman|people|men|women|baby|child|boy|girl|adult)\b"
TWINS: tuple[tuple[str, str], ...] = (
    (r": facing right$", ""),
    (r"^(family|kiss:|couple with heart).*", "family or couple"),
    (rf"^{PEOPLE}(: .*)?$", "person"),
    (r"^(prince|princess|person with crown)$", "royal person"),
    (r"^(santa claus|mrs\. claus|mx claus)$", "christmas person"),
    (r"^(merman|mermaid|merperson)$", "merperson"),
    (r"^(ballet dancer|woman dancing|man dancing)$", "dancer"),
    (r"^breast-feeding$|.* feeding baby$", "feeding baby"),
    (r"^pregnant .*", "pregnant person"),
    (r".* holding hands$", "holding hands"),
    (r"^(men|women|people) ", ""),
    (r"^deaf .*", "deaf person"),
    (r"^(man|woman|person) (in|with|wearing|getting|playing|lifting) ", r"\2 "),
    (r"^(man|woman|person) ", ""),
    (r".*(o'clock|-thirty)$", "clock face"),
    (r"^keycap: .*", "keycap"),
    (rf"^({COLOURS}) heart$", "coloured heart"),
    (rf"^({COLOURS}) circle$", "coloured circle"),
    (rf"^({COLOURS})( large| medium| medium-small| small)? square$", "coloured square"),
    (r"^(large|small) (orange|blue) diamond$", "coloured diamond"),
    (r"^(green|blue|orange|closed) book$", "coloured book"),
    (r"^red triangle pointed .*", "red triangle"),
    (r"^(up|down|left|right)?-?(up|down|left|right) arrow$", "straight arrow"),
    (r".* arrow curving .*", "curved arrow"),
    (r"^(back|end|on|soon|top) arrow$", "word arrow"),
    (r"^(red|white) (question|exclamation) mark$", "question or exclamation mark"),
    (r"^japanese .* button$", "japanese button"),
    (r"^(cl|cool|free|id|new|ng|ok|up|vs) button$|^p button$|^(a|b|ab|o) button.*|^sos button$", "letter button"),
    (r"^input .*", "input symbols"),
    (r"^(waxing|waning|first quarter|last quarter|new|full)( crescent| gibbous)? moon$", "moon phase"),
    (r"^(new|first quarter|last quarter|full) moon face$", "moon face"),
    (r"^globe showing .*", "globe"),
    (r"^(yen|dollar|euro|pound) banknote$", "banknote"),
    (r"^(1st|2nd|3rd) place medal$", "place medal"),
    (r"^speaker (low|medium|high) volume$", "speaker volume"),
    (r"^(open|closed) mailbox .*", "mailbox"),
    (r"^magnifying glass .*", "magnifying glass"),
    (r"^(left|right)-facing fist$", "side-facing fist"),
    (r"^(left|right)wards( pushing)? hand$", "sidewards hand"),
    (r"^backhand index pointing .*", "backhand index pointing"),
    (r"^thumbs (up|down)$", "thumb"),
    (r"^hourglass .*", "hourglass"),
    (r"^(black|white) square button$", "square button"),
    (r"^(single|double)? ?exclamation .*", "exclamation mark"),
)
"""(pattern, base concept): read from top to bottom, each on the result of the one before."""


def base_concept(label: str) -> str:
    """Returns the name that a concept shares with its twins.

    Twins are drawings that differ in gender, age, direction, colour, hour or the like. Whoever has seen one has seen
    the other, so a split or a judgement must not part them.
    """
    for pattern, base in TWINS:
        label = re.sub(pattern, base, label)
    return label


def split_of(base: str) -> str:
    """Returns the split of a base concept; it depends on nothing but its name, so new concepts move no old ones."""
    ticket = int.from_bytes(hashlib.sha256(f"nano split: {base}".encode()).digest()[:8]) % 100
    for split, share in SPLITS.items():
        if ticket < share:
            return split
        ticket -= share
    raise AssertionError("the shares add up to 100")
