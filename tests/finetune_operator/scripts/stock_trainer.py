"""A text classifier, trained with Hugging Face's Trainer as its documentation has it: nothing in here knows of any operator."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

NUM_WORDS, LENGTH = 500, 32


class Sentences(Dataset):
    """Random words; the label says whether one of the first ten words of the vocabulary is among them."""

    def __init__(self, number: int) -> None:
        self.words = torch.randint(NUM_WORDS, (number, LENGTH), generator=torch.Generator().manual_seed(0))
        self.labels = (self.words < 10).any(dim=1).long()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


class StopWhenAsked(TrainerCallback):
    """Ends the training at the step after a file has appeared."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  the library's names
        control.should_training_stop |= self.path.exists()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    config = BertConfig(
        vocab_size=NUM_WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=2
    )
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        use_cpu=True,
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=settings,
        train_dataset=Sentences(2000),
        callbacks=[StopWhenAsked(arguments.output / "stop")],
    )
    trainer.train(resume_from_checkpoint=arguments.resume)


if __name__ == "__main__":
    main()
