"""What the tests of the GLUE recipe share; a test file asks for it with `pytest_plugins`."""

from pathlib import Path

import pytest
from tiny_glue import rte, save_bert, write_task

from hf_lsam_recipes import run_glue
from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def glue(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("glue")
    for task in GLUE_TASKS:
        write_task(folder, task)
    return str(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, bert, glue) -> Path:
    """What a run on RTE with a checkpoint at each of two steps leaves. Read-only."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    run_glue.main([*rte(bert, glue, folder), "--do_train", "--do_eval", "--save_steps", "1"])
    return folder
