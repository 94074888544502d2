"""The same as task.yaml, from Python: python train.py"""

from objective import DrGRPO
from rewards import ends_right

import prerl_lightning as prerl

STEPS = 20

if __name__ == "__main__":  # several ranks would start this file once each
    data = prerl.RolloutDataModule(
        train=prerl.Files("problems.jsonl", prompt="question", answer="result"),
        val=prerl.Files("held_out.jsonl", prompt="question", answer="result"),
        reward=ends_right,
        prompts_per_step=16,
        sampling=prerl.Sampling(group_size=8, max_new_tokens=64),
        engine=prerl.VLLMEngine(max_model_len=128),
    )
    run = prerl.fit(DrGRPO(model="embedded-sums", lr=3e-4), data, max_steps=STEPS, name="own_task")
    print(f"{run.accuracy:.3f} of the held-out answers are right; the model is in {run.model}")
