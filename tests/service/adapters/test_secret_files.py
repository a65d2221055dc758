import pytest

from service.adapters.secret_files import JobSecrets
from service.domain.errors import UpstreamRejected
from trainer.jobspec import InvalidField


async def test_without_a_folder_there_are_no_secrets():
    none = JobSecrets(None)
    assert await none.resolve("ann", {}) == none.paths({}) == {}
    with pytest.raises(InvalidField, match="SYNCBN_SECRETS_FOLDER"):
        await none.resolve("ann", {"KEY": "key"})
    with pytest.raises(UpstreamRejected, match=r"ann/key.*SYNCBN_SECRETS_FOLDER"):
        none.paths({"KEY": "ann/key"})


async def test_links_within_the_owners_folder_are_followed(tmp_path):
    # As Kubernetes mounts secrets.
    (tmp_path / "ann" / "..data").mkdir(parents=True)
    (tmp_path / "ann" / "..data" / "key").write_text("x")
    (tmp_path / "ann" / "key").symlink_to("..data/key")
    secrets = JobSecrets(tmp_path)
    assert await secrets.resolve("ann", {"KEY": "key"}) == {"KEY": "ann/key"}
    assert secrets.paths({"KEY": "ann/key"}) == {"KEY": f"{tmp_path}/ann/key"}
