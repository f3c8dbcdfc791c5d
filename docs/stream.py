"""A stream of video on a CPU: latency per frame and memory, while questions come.

`python docs/stream.py` needs no published weights: the model is a LLaVA-OneVision of random weights with a
tiny tower (16 patches per frame), so that the answers mean nothing and the times are those of the loop.
`python docs/stream.py 10000` runs more frames.
"""

import resource
import statistics
import sys
import time

import torch

from vistok import compress
from vistok.compress.tiny.prompted import build

FRAMES, REPORTS, MAX_TOKENS = 500, 10, 200
PROMPT = "USER : <video> what is in the image ASSISTANT :"


def frame(number: int) -> torch.Tensor:
    """Frame `number` of an endless video, uint8 [1, 3, 60, 80]: a light square that wanders over noise."""
    generator = torch.Generator().manual_seed(number // 50)  # a cut every 50 frames
    picture = torch.randint(0, 128, (1, 3, 60, 80), generator=generator, dtype=torch.uint8)
    left = number % 60
    picture[:, :, 20:40, left : left + 20] = 255
    return picture


def main() -> None:
    """Print a table of latency, tokens and memory, and whether memory is flat."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else FRAMES
    fixture = build("llava_onevision")
    fixture.model.eval()
    stream = compress.Stream(
        fixture.model, compress.STC(keep=2), fixture.processor, max_tokens=MAX_TOKENS, min_frame_tokens=1
    )
    step, sizes, process, seconds = max(total // REPORTS, 1), [], [], []
    print("| frames | ms per frame | tokens held | stream, bytes | process, MB | answer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for number in range(total):
        started = time.perf_counter()
        stream.add(frame(number))
        seconds.append(time.perf_counter() - started)
        if (number + 1) % step == 0:
            answer = stream.ask(PROMPT, max_new_tokens=4, do_sample=False)
            sizes.append(stream.bytes())
            process.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            latency = 1000 * statistics.median(seconds[-step:])
            row = (number + 1, f"{latency:.2f}", stream.tokens, sizes[-1], f"{process[-1]:.0f}", answer)
            print(f"| {' | '.join(map(str, row))} |")
    half = len(sizes) // 2
    growth, peak = max(sizes[half:]) / min(sizes[half:]) - 1, process[-1] / process[half] - 1
    print(f"second half: the stream grew by {growth:.2%}, the peak of the process by {peak:.2%}")


if __name__ == "__main__":
    main()
