"""Adapters for measurements, written by PEFT with random weights. Speed does not depend on their content."""

from pathlib import Path

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(model: Path, folder: Path, rank: int, count: int) -> dict[str, Path]:
    """Write `count` adapters of this rank over all linear layers of `model`, strong enough to change its answers. Returns their folders
    by name."""
    import torch  # noqa: PLC0415 (slow to import, and not needed by the command line)
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))
    made = {}
    for number in range(count):
        torch.manual_seed(1000 * rank + number)
        for name, weights in adapted.named_parameters():
            if "lora_" in name:
                weights.data.normal_(std=0.03 if "lora_B" in name else weights.shape[1] ** -0.5)
        made[f"rank{rank}-{number}"] = folder / f"rank{rank}-{number}"
        adapted.save_pretrained(str(made[f"rank{rank}-{number}"]))
    return made
