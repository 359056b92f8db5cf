"""What only a GPU can show: half precision with a loss scaler, and resume there. Skipped where there is none."""

import pytest
import torch
from safetensors.torch import load_file

from sdlora.config_io import load_config
from sdlora.training.folder import reopen
from sdlora.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_on_the_gpu_exports_and_goes_on(tiny_base, style_dir, tmp_path, precision):
    flags = {
        "base.model": str(tiny_base),
        "data.images": style_dir,
        "lora.rank": 2,
        "train.precision": precision,
        "train.steps": 6,
        "train.stop_at": 3,
        "output.output": tmp_path / "run",
        "samples.sample_steps": 2,
    }
    half = train(load_config(None, flags))
    run, config = reopen(half.folder, {}, ())
    result = train(config, resume=run)
    assert result.finished
    assert result.loss_end == result.loss_end  # not NaN
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(result.lora).values())
