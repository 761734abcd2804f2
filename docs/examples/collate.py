"""Change a micro-batch after it was padded."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class MultiplesOf8:
    """Pad to a multiple of 8 tokens, which tensor cores like."""

    @hookimpl(wrapper=True)
    def collate(self, tokenizer):
        import torch

        batch = yield
        missing = -batch["input_ids"].shape[1] % 8
        for key, value in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0)):
            batch[key] = torch.nn.functional.pad(batch[key], (0, missing), value=value)
        return batch
