from tests.trainer.data.image_folders import folder
from trainer.data.folders import open_folders


def test_hidden_and_system_folders_and_files_are_ignored(root):
    before = open_folders(folder(root))
    for path in (
        ".ipynb_checkpoints/0.png",
        "__MACOSX/cat/0.png",
        "cat/.hidden/0.png",
        "cat/._0.png",
        "@eaDir/0.png",
    ):
        for part in ("train", "val"):
            (root / part / path).parent.mkdir(parents=True, exist_ok=True)
            (root / part / path).write_bytes(b"no image")
    (root / "train" / ".link").symlink_to("gone")
    after = open_folders(folder(root))
    assert (after.classes, after.class_names, after.digest) == (2, ["cat", "dog"], before.digest)
