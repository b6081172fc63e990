"""Write the emoji picture set as an imagefolder: one folder for each of the nine categories, 1,906 pictures of 64 pixels."""

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packages import DataError, Package, allocate, fetch, read_members, write_folder

PACKAGES = {
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        megabytes=74,
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        megabytes=62,
    ),
}
SKIN_TONES = "Component"  # five bare colour patches: no category anybody would want to tell apart


@dataclass(frozen=True)
class Emoji:
    """One picture: its category as a folder name, its name, and its file in the package."""

    category: str
    name: str
    image: str


def main() -> int:
    """Make the picture set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("destination", type=Path, help="folder to make; left alone if it already holds these pictures")
    parser.add_argument("--vendor", choices=sorted(PACKAGES), default="google", help="who drew the pictures")
    parser.add_argument("--limit", type=int, help="this many pictures instead of all, the categories in proportion")
    arguments = parser.parse_args()
    try:
        pictures = make_pictures(arguments.vendor, limit=arguments.limit)
        written = write_folder(pictures, arguments.destination)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.destination}: {len(pictures)} pictures{'' if written else ', up to date'}")
    return 0


def make_pictures(vendor: str, *, limit: int | None) -> dict[str, bytes]:
    """Return the pictures of a vendor by their path in the imagefolder."""
    tarball = fetch(PACKAGES[vendor])
    catalogue = json.loads(read_members(tarball, prefix="emoji.json")["emoji.json"])
    chosen = choose(list_emojis(catalogue, vendor=vendor), limit=limit)
    folder = f"img/{vendor}/64/"
    images = read_members(tarball, prefix=folder)
    return {f"{emoji.category}/{emoji.name}.png": images[folder + emoji.image] for emoji in chosen}


def list_emojis(catalogue: list[dict[str, object]], *, vendor: str) -> list[Emoji]:
    """Return the emojis that the vendor drew, in the default skin tone, without the skin tone patches."""
    return [
        Emoji(folder_name(str(entry["category"])), folder_name(str(entry["short_name"])), str(entry["image"]))
        for entry in catalogue
        if entry[f"has_img_{vendor}"] and entry["category"] != SKIN_TONES
    ]


def folder_name(title: str) -> str:
    """Return a title in the letters that every file system and label takes: "People & Body" is people-and-body, "-1" minus-1."""
    spelled = re.sub(r"^-", "minus-", title.lower().replace("&", " and ").replace("+", "plus-"))
    return re.sub(r"[^a-z0-9_]+", "-", spelled).strip("-")


def choose(emojis: list[Emoji], *, limit: int | None) -> list[Emoji]:
    """Return as many emojis as the limit says, categories in proportion; the choice depends on the names alone."""
    if limit is None:
        return emojis
    by_category: Mapping[str, list[Emoji]] = group(emojis)
    shares = allocate(limit, {category: len(members) for category, members in by_category.items()})
    return [
        emoji
        for category, members in by_category.items()
        for emoji in sorted(members, key=lambda emoji: hashlib.sha256(emoji.name.encode()).digest())[: shares[category]]
    ]


def group(emojis: list[Emoji]) -> dict[str, list[Emoji]]:
    """Return the emojis by category."""
    by_category = defaultdict(list)
    for emoji in emojis:
        by_category[emoji.category].append(emoji)
    return dict(by_category)


if __name__ == "__main__":
    sys.exit(main())
