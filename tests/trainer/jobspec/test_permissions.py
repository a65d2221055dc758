import pytest

from trainer.jobspec import Allowlist, JobSpec, NotAllowed


def spec(**changes):
    return JobSpec.model_validate({"steps": 1} | changes)


def folder(root):
    return spec(data={"name": "imagefolder", "root": str(root)})


def test_specs_without_external_resources_need_no_permission():
    Allowlist().check(spec())
    Allowlist().check(spec(model={"name": "torchvision:resnet18"}, data={"name": "torchvision:FakeData"}))


@pytest.mark.parametrize("allowed", ["models:build", "models:*", "other:x,models:build"])
def test_a_function_is_allowed_by_its_name_or_with_its_whole_module(allowed):
    Allowlist(imports=tuple(allowed.split(","))).check(spec(model={"name": "import:models:build"}))


@pytest.mark.parametrize(
    "function",
    [
        "models:other",
        "models:_build",
        "models.vision:build",
        "model:build",
        "models2:build",
        "other.models:build",
        "os:system",
    ],
)
def test_other_functions_are_refused(function):
    for allowed in (("models:build", "vision:*"), ("models.sub:*",), ("models",), ("*",), ()):
        with pytest.raises(NotAllowed, match=r"model\.name: must be an allowed function: "):
            Allowlist(imports=allowed).check(spec(model={"name": f"import:{function}"}))
    with pytest.raises(NotAllowed):
        Allowlist(imports=("models:*",)).check(spec(model={"name": "import:models:_private"}))


def test_a_path_is_checked_after_resolution(tmp_path):
    allowed, other = tmp_path / "data", tmp_path / "data-of-others"
    (allowed / "mine").mkdir(parents=True)
    other.mkdir()
    (allowed / "link").symlink_to(other)
    permissions = Allowlist(roots=(str(allowed),))
    (allowed / "circle").symlink_to(allowed / "circle")
    permissions.check(folder(allowed))
    permissions.check(folder(allowed / "mine"))
    permissions.check(folder(f"{other}/../data/mine"))
    for refused in (
        other,
        allowed / "link",
        allowed / "circle",
        f"{allowed}/../data-of-others",
        "data",
        tmp_path,
        "/",
    ):
        with pytest.raises(NotAllowed, match=r"data\.root"):
            permissions.check(folder(refused))


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("s3://bucket/mine/images", True),
        ("s3://bucket/mine", True),
        ("s3://bucket/mine2", False),
        ("s3://bucket/mine/../others", False),
        ("s3://other/mine", False),
        ("gs://bucket/mine", False),
        ("zip://x::s3://bucket/mine", False),
        ("/bucket/mine", False),
        ("file:///data/images", True),
        ("file:///etc", False),
        ("s3://bucket/mine/%2e%2e/others", False),
        ("file:///data/x::zip", False),
        ("/data/\0", False),
    ],
)
def test_addresses_are_allowed_below_their_root(address, is_allowed):
    data = {"name": "ray", "format": "parquet", "train": address, "test": address, "classes": 2, "shape": [4]}
    permissions = Allowlist(roots=("s3://bucket/mine", "/data"))
    if is_allowed:
        permissions.check(spec(data=data))
    else:
        with pytest.raises(NotAllowed, match=r"data\.train"):
            permissions.check(spec(data=data))


def test_checkpoints_are_written_only_below_a_root():
    with pytest.raises(
        NotAllowed, match=r"checkpoint\.address: must be an absolute path or address under none"
    ):
        Allowlist().check(spec(checkpoint={"address": "/anywhere"}))


def test_runs_by_hand_have_no_restrictions():
    Allowlist(everything=True).check(
        spec(model={"name": "import:models:build"}, checkpoint={"address": "/anywhere"})
    )
