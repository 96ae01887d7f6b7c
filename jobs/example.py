"""Two prompts through the embedded model, with the engine's log on the screen: python -m jobs.example"""

from jobs.tasks import SYSTEM
from nanovllm import LLM, SamplingParams

QUESTIONS = ("What is 17 + 25?", "Sort these words from A to Z: river, apple, moon, cabin")


def main() -> None:
    llm = LLM("tiny", max_num_seqs=8)
    conversations = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=64), use_tqdm=False)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question}\n    {output.text}    ({output.finish_reason}, {len(output.token_ids)} tokens)")


if __name__ == "__main__":
    main()
