"""nnssl's list of images: what it names is prepared, what is wrong with an entry is said of that entry."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError


def write_list(file: Path, images: dict[str, list[Any]]) -> Path:
    """Images by "dataset/subject/session", in the form that nnssl's Collection.to_dict() writes."""
    datasets: dict[str, Any] = {}
    for place, listed in images.items():
        dataset, subject, session = place.split("/")
        in_dataset = datasets.setdefault(
            dataset, {"dataset_index": dataset, "name": None, "dataset_info": None, "subjects": {}}
        )
        in_subject = in_dataset["subjects"].setdefault(
            subject, {"subject_id": subject, "subject_info": {"age": 60}, "sessions": {}}
        )
        in_subject["sessions"][session] = {"session_id": session, "session_info": None, "images": listed}
    file.write_text(
        json.dumps({"collection_index": 1, "collection_name": "made up", "datasets": datasets}), encoding="utf-8"
    )
    return file


def image(path: str, modality: str | None = "T1w", name: str | None = None) -> dict[str, Any]:
    masks = {"anonymization_mask": None, "anatomy_mask": None}
    name = name or path.rpartition("/")[2]
    return {"name": name, "image_path": path, "modality": modality, "image_info": {}, "associated_masks": masks}


def test_images_of_a_list_are_prepared_under_their_ids(
    tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("near/a.nii.gz", "near/b.nrrd", "far/c.nii.gz", "far/d.mha", "far/e.nii.gz")):
        write(tmp_path / name, number)
    monkeypatch.setenv("made_up_root", str(tmp_path / "far"))
    listed = write_list(
        tmp_path / "near/pretrain_data.json",
        {
            "Dataset1/sub-1/ses-1": [image("a.nii.gz"), image("b.nrrd", "CT")],
            "Dataset1/sub-1/ses-2": [image("$made_up_root/c.nii.gz", "post-contrast FLAIR")],
            "Dataset2/sub-1/ses-1": [image(str(tmp_path / "far/d.mha"), "cta"), image("../far/e.nii.gz", None)],
        },
    )
    summary = run(listed, tmp_path / "store")
    assert (summary.prepared, summary.exit_code) == (5, 0)
    assert {case.id: (case.source, case.modality) for case in Store(tmp_path / "store").cases} == {
        "Dataset1__sub-1__ses-1__a": ("Dataset1/sub-1/ses-1/a.nii.gz", "mr"),
        "Dataset1__sub-1__ses-1__b": ("Dataset1/sub-1/ses-1/b.nrrd", "ct"),
        "Dataset1__sub-1__ses-2__c": ("Dataset1/sub-1/ses-2/c.nii.gz", "mr"),
        "Dataset2__sub-1__ses-1__d": ("Dataset2/sub-1/ses-1/d.mha", "ct"),
        "Dataset2__sub-1__ses-1__e": ("Dataset2/sub-1/ses-1/e.nii.gz", "mr"),
    }
    assert run(listed, tmp_path / "store").unchanged == 5
    run(listed, tmp_path / "as_mr", modality="mr")
    assert {case.modality for case in Store(tmp_path / "as_mr").cases} == {"mr"}, "what is asked for goes first"
    listed.write_text(listed.read_text(encoding="utf-8").replace('"cta"', '"T2w"'))
    assert run(listed, tmp_path / "store").prepared == 1, "another modality is another volume"


def test_bad_entries_get_a_line_each(tmp_path: Path, write: Callable, run: Callable, rejected: Callable) -> None:
    write(tmp_path / "good.nii.gz", 1)
    (tmp_path / "empty.nii.gz").touch()
    session: list[Any] = [
        image("good.nii.gz"),
        image("gone.nii.gz"),
        image("empty.nii.gz"),
        image("picture.png"),
        image("$nowhere_at_all/x.nii.gz"),
        image("good.nii.gz", "PET", name="pet"),
        {"name": "pathless", "modality": "T1w"},
        "not even an object",
        None,
    ]
    listed = write_list(tmp_path / "list.json", {"D/s/1": session, "D/s/2": [image("good.nii.gz", name="x")] * 2})
    collection = json.loads(listed.read_text(encoding="utf-8"))
    collection["datasets"]["D"]["subjects"] |= {"broken": {"sessions": {"1": {"images": 7}}}, "empty": {"sessions": {}}}
    collection["datasets"]["E"] = None
    listed.write_text(json.dumps(collection))
    summary = run(listed, tmp_path / "store")
    assert (summary.prepared, summary.exit_code) == (1, 1)
    lines = {file: line["reason"] for file, line in rejected(tmp_path / "store").items() if file != "D/s/2/x"}
    assert lines == {
        "D/s/1/gone.nii.gz": "the file does not exist",
        "D/s/1/empty.nii.gz": "the file is empty (0 bytes)",
        "D/s/1/picture.png": "the image_path picture.png has no ending of .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd",
        "D/s/1/x.nii.gz": "its path begins with $nowhere_at_all, an environment variable that is not set",
        "D/s/1/pet": "modality PET, CT or MR was expected",
        "D/s/1/pathless": "the entry has no image_path",
        "D/s/1/image 7": "the entry has no image_path",
        "D/s/1/image 8": "the entry has no image_path",
        "D/broken/1": "the entry has no images",
        "E": "the entry has no subjects",
    }
    reasons = [
        json.loads(line) for line in (tmp_path / "store/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {line["reason"] for line in reasons if line["file"] == "D/s/2/x"} == {
        "a second image of this name in its session",
        "duplicate: the same bytes as D/s/1/good.nii.gz, which is in the store",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a list of nnssl"),
        ('{"datasets": []}', "is not a list of nnssl"),
        ('{"datasets": {}}', "lists no image"),
    ],
)
def test_what_is_no_list_is_an_error(text: str, words: str, tmp_path: Path, run: Callable) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=words):
        run(tmp_path / "list.json", tmp_path / "store")
