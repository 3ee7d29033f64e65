"""An event file as TensorBoard's own writer makes it, and a check that TensorBoard reads ours.

Run: python make_tensorboard.py            writes tensorboard/events.bin (tensorboard, numpy<2)
     python make_tensorboard.py check DIR  prints tags, steps and values that TensorBoard reads from DIR
"""

import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def make():
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    def scalars(wall_time, step, **values):
        value = [Summary.Value(tag=tag.replace("__", "/"), simple_value=v) for tag, v in values.items()]
        return Event(wall_time=wall_time, step=step, summary=Summary(value=value))

    events = [
        Event(wall_time=1234.5, file_version="brain.Event:2"),
        scalars(1235.25, 1, train__loss=2.5, train__learning_rate=2e-4),
        scalars(1240.0, 300, eval__loss=1.75),
        scalars(1240.0, 0, eval__loss=9.0),
    ]
    out = io.BytesIO()
    writer = RecordWriter(out)
    for event in events:
        writer.write(event.SerializeToString())
    (ROOT / "tensorboard/events.bin").write_bytes(out.getvalue())


def check(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    for tag in events.Tags()["scalars"]:
        values = events.Scalars(tag)
        print(f"{tag}: {len(values)} events, steps {values[0].step} to {values[-1].step}, last {values[-1].value:.6g}")


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1:2] == ["check"] else make()
