"""Lists of training files for tests."""

from trainer.data.files import list_files


def list_train(data):
    return list_files("data.train", data.train, data)
