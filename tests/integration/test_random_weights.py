"""`mili serve --load-format random`: a folder without weights is enough to serve."""

from __future__ import annotations

import json
from pathlib import Path

import grpc

from mili.client import AsyncClient
from mili.hub.folder import random_weights_sha256
from mili.v1.admin_pb2 import GetServerRequest
from mili.v1.admin_pb2_grpc import AdminServiceStub
from tests.model_folders import make_model_folder
from tests.serving import STEADY, serving


async def test_two_workers_draw_the_same_model(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny", "qwen3", tie=False)
    (folder / "model.safetensors").unlink()
    flags = ("--load-format", "random", "--workers", "2")
    with serving(folder, tmp_path / "log", *flags, **STEADY) as served:
        async with AsyncClient(served.address) as client:
            answer = await client.generate([5, 6, 7], temperature=0, max_tokens=16, ignore_eos=True)
        async with grpc.aio.insecure_channel(served.admin) as channel:
            server = await AdminServiceStub(channel).GetServer(GetServerRequest())
    assert len(set(answer.token_ids)) > 4
    config = json.loads((folder / "config.json").read_text())
    revision = random_weights_sha256(config, "cpu").hex()[:16]
    assert answer.model_revision == revision
    assert {worker.model_revision for worker in server.workers} == {revision}
    assert server.startup_phases[0].name == "read model"
    serving_workers = [worker for worker in server.workers if worker.startup_phases]
    assert serving_workers
    for worker in serving_workers:
        phases = {each.name: each.duration.ToTimedelta() for each in worker.startup_phases}
        assert phases["load weights"].total_seconds() > 0
