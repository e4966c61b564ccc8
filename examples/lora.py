"""Fine-tune adapters (LoRA) with PEFT: two small matrices beside each query and value, and a head.

python examples/lora.py --model CHECKPOINT --train VIDEOS --val VIDEOS --output_dir FOLDER   options as of trainer.py

`PeftModel.from_pretrained(model, FOLDER)` puts them into the model again; `merge_and_unload()` makes it a plain one.
"""

from peft import LoraConfig, PeftModel, get_peft_model
from trainer import main

from everest_hf import EverestForVideoClassification


def add_adapters(model: EverestForVideoClassification) -> PeftModel:
    """Return the model with adapters; they and the head are trained, nothing else."""
    head = ["classifier", "fc_norm"] if model.config.use_mean_pooling else ["classifier"]
    return get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=head))


if __name__ == "__main__":
    print(main(add_adapters))
