import subprocess
import sys
from types import ModuleType

import syncbn


def test_all_is_the_public_namespace():
    public = {
        name for name, value in vars(syncbn).items() if name[0] != "_" and not isinstance(value, ModuleType)
    }
    assert public == set(syncbn.__all__)
    assert syncbn.__all__ == sorted(syncbn.__all__)


def test_the_package_imports_torch_and_the_standard_library_alone():
    program = (
        "import sys, torch, torch.distributed; before = set(sys.modules); import syncbn; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert set(answer.stdout.split()) - set(sys.stdlib_module_names) <= {"syncbn", "torch"}


def test_every_error_is_of_one_tree():
    errors = [syncbn.InputError, syncbn.GroupError, syncbn.ConversionError]
    assert all(issubclass(error, syncbn.SyncBatchNormError) for error in errors)
    assert issubclass(syncbn.InputError, ValueError)
    assert issubclass(syncbn.GroupError, ValueError)
    assert issubclass(syncbn.ConversionError, TypeError)
