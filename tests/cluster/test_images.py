"""Names of images, and which of them are outdated."""

from pathlib import Path

from localcluster.images import image_reference, outdated_references


def make_tree(folder: Path) -> Path:
    for name in ("api", "operator", "trainer"):
        (folder / name / "code").mkdir(parents=True)
        (folder / name / "pyproject.toml").write_text(f"[project]\nname = '{name}'\n")
        (folder / name / "code" / "module.py").write_text("value = 1\n")
    for name in ("Dockerfile", ".dockerignore", "uv.lock", "pyproject.toml"):
        (folder / name).write_text(name)
    return folder


def test_change_of_code_changes_only_the_images_that_hold_it(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    before = {name: image_reference(tree, name) for name in ("operator", "trainer")}
    (tree / "trainer" / "code" / "module.py").write_text("value = 2\n")
    after = {name: image_reference(tree, name) for name in ("operator", "trainer")}

    assert after["operator"] == before["operator"]
    assert after["trainer"] != before["trainer"]


def test_bytecode_does_not_change_an_image(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    before = image_reference(tree, "operator")
    (tree / "operator" / "code" / "__pycache__").mkdir()
    (tree / "operator" / "code" / "__pycache__" / "module.cpython-311.pyc").write_bytes(b"x")

    assert image_reference(tree, "operator") == before


def test_all_but_the_last_images_of_a_name_are_outdated() -> None:
    known = ("x/finetune-operator:1", "x/finetune-trainer:1", "x/finetune-operator:2", "x/finetune-operator:3")

    outdated = outdated_references(known, name="operator", current="x/finetune-operator:3")

    assert outdated == ("x/finetune-operator:1",)
