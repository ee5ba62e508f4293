"""Loss of quality of each way to quantise the demo, on clips outside of training and calibration.

    python benchmarks/quantisation.py --artifact build/demo/artifact [--only "W8A16, headroom 2" ...]

The UNet is quantised in each setting and judged on held-out clips: SQNR of its latents against float, and
PSNR of frames 2 to 14 against the truth. The other components are the float ones of `--artifact`, so that
only the UNet differs. The file is written after each setting; settings in it are measured again only if
`--only` names them. One setting takes about a minute on two cores, AdaRound almost an hour.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from _common import RESULTS, write_result
from torch import nn

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.config.recipe import QuantScheme, load_recipe
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
from mobilevd_deploy.quantize import simulation as quantize
from mobilevd_deploy.quantize.calibration import drawn_pictures
from mobilevd_deploy.quantize.simulation import Quantised, quantise
from mobilevd_deploy.runtime.media import to_uint8
from mobilevd_deploy.runtime.pipeline import ClipJob, loader, run_component
from mobilevd_deploy.stages.export import deploy_form
from mobilevd_deploy.synthetic.clips import HELD_OUT, make_clip
from mobilevd_deploy.training.quality import score, summarise

RESULT = "quantisation"
JUDGES = 4
MOST_SAMPLES = 16


@dataclass(frozen=True)
class Setting:
    """A scheme, and AIMET's further options: how ranges are found, how weights are rounded."""

    name: str
    scheme: QuantScheme
    ranges: Literal["min-max", "sqnr", "percentile"] = "min-max"
    weights: Literal["nearest", "sequential mse", "adaround"] = "nearest"


W8A16, W8A8, W4A16 = (QuantScheme(weights=w, activations=a) for w, a in ((8, 16), (8, 8), (4, 16)))  # type: ignore[arg-type]
SHIPPED = cast(QuantScheme, load_recipe("xiaomi-14-pro").quant)
SETTINGS = (
    Setting("W8A16, headroom 1.25", W8A16),
    Setting("W8A8", W8A8),
    Setting("W4A16", W4A16),
    Setting("W8A16, headroom 1", QuantScheme(headroom=1)),
    Setting("W8A16, headroom 2", QuantScheme(headroom=2)),
    Setting("W8A16, SQNR ranges", W8A16, ranges="sqnr"),
    Setting("W8A16, percentile 99.99", W8A16, ranges="percentile"),
    Setting("W8A16, 4 samples", QuantScheme(samples=4)),
    Setting("W8A16, 16 samples", QuantScheme(samples=16)),
    Setting("W8A16, 16 samples, headroom 1", QuantScheme(samples=16, headroom=1)),
    Setting("W8A16, headroom 1.5", QuantScheme(headroom=1.5)),
    Setting("W8A8, SQNR ranges", W8A8, ranges="sqnr"),
    Setting("W4A16, sequential MSE", W4A16, weights="sequential mse"),
    Setting("W4A16, AdaRound", W4A16, weights="adaround"),
    Setting("W8A16, AdaRound", W8A16, weights="adaround"),
    Setting("the shipped recipe", SHIPPED.of("unet")),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[setting.name for setting in SETTINGS])
    arguments = parser.parse_args()

    bench = Bench(Artifact.open(arguments.artifact))
    path = RESULTS / f"{RESULT}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["settings"] if path.exists() else []
    rows = {row["name"]: row for row in known}
    for setting in SETTINGS:
        if arguments.only is None and setting.name in rows:
            continue
        if arguments.only is not None and setting.name not in arguments.only:
            continue
        rows[setting.name] = asdict(setting) | bench.measure(setting)
        ordered = [rows[s.name] for s in SETTINGS if s.name in rows]
        write_result(
            RESULT,
            {
                "checkpoint_sha256": bench.checkpoint.sha256,
                "judged_on": {"stream": 0, "first_index": HELD_OUT, "clips": JUDGES},
                "float_psnr_db": bench.float_psnr,
                "settings": ordered,
            },
        )


class Bench:
    """The UNet's inputs for calibration and judging, computed once by the float graphs."""

    def __init__(self, artifact: Artifact) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(data_dir("models") / "demo.safetensors")
        self.recipe = load_recipe("xiaomi-14-pro")
        components = {c.name: c for c in artifact.manifest.components}
        self.unet, self.decoder = components["unet"], components["decoder"]
        self.load = loader(artifact, "onnx")
        spec = self.checkpoint.spec
        drawn = drawn_pictures(spec.width, spec.height, MOST_SAMPLES, seed=0).values[:MOST_SAMPLES]
        self.clips = [make_clip(0, HELD_OUT + i) for i in range(JUDGES)]
        first = [
            (clip.frames[:1].transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32) for clip in self.clips
        ]
        self.samples = [ClipJob(picture, i) for i, picture in enumerate(drawn)]
        self.judges = [ClipJob(picture, i) for i, picture in enumerate(first)]
        for name in ("image_encoder", "vae_encoder"):
            run_component(components[name], self.load, [*self.samples, *self.judges])
        run_component(self.unet, self.load, self.judges)
        self.float_psnr = self._psnr([judge.outputs["unet"] for judge in self.judges])
        print(f"{'float':40}{'':>10}{self.float_psnr:8.2f} dB PSNR", flush=True)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Quantise with one setting and judge the result."""
        begun = time.monotonic()
        with torch.no_grad():
            quantised = self._quantise(setting)
        seconds = time.monotonic() - begun
        given = [quantised.run(judge.feeds(self.unet)) for judge in self.judges]
        sqnr = [sqnr_db(j.outputs["unet"], out) for j, out in zip(self.judges, given, strict=True)]
        psnr = self._psnr(given)
        shown = f"{min(sqnr):7.2f} to {max(sqnr):.2f} dB SQNR {psnr:8.2f} dB PSNR"
        print(f"{setting.name:40}{shown}{seconds:6.0f} s", flush=True)
        return {
            "unet_sqnr_db": {"worst": min(sqnr), "mean": float(np.mean(sqnr))},
            "psnr_db": psnr,
            "psnr_lost_db": self.float_psnr - psnr,
            "seconds": round(seconds, 1),
        }

    def _psnr(self, latents: list[Any]) -> float:
        jobs = [
            ClipJob(judge.image, judge.seed, judge.outputs | {"unet": given})
            for judge, given in zip(self.judges, latents, strict=True)
        ]
        run_component(self.decoder, self.load, jobs)
        scores = [
            score(clip, to_uint8(job.outputs["decoder"])) for clip, job in zip(self.clips, jobs, strict=True)
        ]
        return summarise(scores)["psnr_db"]

    def _feeds(self, samples: int) -> Iterator[Tensors]:
        return (job.feeds(self.unet) for job in self.samples[:samples])

    def _quantise(self, setting: Setting) -> Quantised:
        trained = self.checkpoint.load("unet")
        network, _ = deploy_form("unet", trained, self.checkpoint.spec, self.recipe, Progress())
        scheme = setting.scheme
        if setting.weights == "adaround":
            network = self._adaround(network, scheme)
        quantised = quantise(network, self._feeds(scheme.samples), scheme)
        if setting.weights == "sequential mse":
            self._sequential_mse(quantised)
        if setting.ranges != "min-max":
            self._find_ranges(quantised, setting)
        return quantised

    def _find_ranges(self, quantised: Quantised, setting: Setting) -> None:
        from aimet_torch.quantization.encoding_analyzer import (
            PercentileEncodingAnalyzer,
            SqnrEncodingAnalyzer,
        )

        sim, analyzer = quantised.sim, SqnrEncodingAnalyzer
        for module in sim.qmodules():
            for quantiser in (*module.input_quantizers, *module.output_quantizers):
                if quantiser is not None and quantiser.is_overwrite_allowed():
                    if setting.ranges == "percentile":
                        quantiser.encoding_analyzer = PercentileEncodingAnalyzer(quantiser.shape, 2048, 99.99)
                    else:
                        quantiser.encoding_analyzer = analyzer(quantiser.shape)
        sim.compute_encodings(lambda model: quantize._run_all(model, self._feeds(setting.scheme.samples)))
        quantize._use_all_steps(sim)
        quantize._stretch(sim, setting.scheme.headroom)

    def _sequential_mse(self, quantised: Quantised) -> None:
        """Choose the ranges of weights; those of activations stay, because they hardly depend on them."""
        from aimet_torch.seq_mse import apply_seq_mse

        batches = [quantize.as_arguments(feeds) for feeds in self._feeds(4)]
        with quantize._silence():
            apply_seq_mse(quantised.sim, batches, 20, lambda model, batch: model(*batch))

    def _adaround(self, network: nn.Module, scheme: QuantScheme) -> nn.Module:
        """Round weights up or down so that each layer's output changes least; they stay on the grid."""
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
        from aimet_torch.common.defs import QuantScheme as Ranges

        quantize._swap_arithmetic(network, quantize._load_aimet().arithmetic)
        batches = [quantize.as_arguments(feeds) for feeds in self._feeds(4)]
        parameters = AdaroundParameters(
            batches, len(batches), default_num_iterations=500, forward_fn=lambda model, batch: model(*batch)
        )
        with tempfile.TemporaryDirectory() as folder, quantize._silence(), torch.enable_grad():
            return Adaround.apply_adaround(
                network,
                batches[0],
                parameters,
                folder,
                "adaround",
                default_param_bw=scheme.weights,
                default_quant_scheme=Ranges.post_training_tf,
                default_config_file=str(data_dir("export") / quantize.RULES),
            )


if __name__ == "__main__":
    main()
