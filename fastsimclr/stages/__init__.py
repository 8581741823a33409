"""The stages: each reads a recipe, builds the parts, runs the trainer and writes result.json."""

from fastsimclr.stages.chain import run_chain, run_seeds
from fastsimclr.stages.classifiers import finetune, supervised
from fastsimclr.stages.distillation import distill
from fastsimclr.stages.evaluation import evaluate_knn, evaluate_linear
from fastsimclr.stages.networks import recipe_path
from fastsimclr.stages.pretrain import pretrain
from fastsimclr.stages.protocols import evaluate
from fastsimclr.stages.registry import STAGES
from fastsimclr.stages.report import evaluation_lines, result_lines, summary
from fastsimclr.stages.setting import Setting

__all__ = [
    "STAGES",
    "Setting",
    "distill",
    "evaluate",
    "evaluate_knn",
    "evaluate_linear",
    "evaluation_lines",
    "finetune",
    "pretrain",
    "recipe_path",
    "result_lines",
    "run_chain",
    "run_seeds",
    "summary",
    "supervised",
]
