from pathlib import Path

from pipeline.report.graph import sharing_graph
from tests.support.small_world import compared


def test_stages_that_the_same_runs_share_stand_in_one_box(outputs: Path):
    graph = sharing_graph(compared(outputs, "trial", "again"))
    boxes = {box.users: [stage.name for stage in box.stages] for box in graph.boxes}
    assert boxes == {
        ("trial.0", "trial.1", "trial.2", "again"): ["prepare"],
        ("trial.0",): ["painter", "critic"],
        ("trial.1", "again"): ["painter", "critic"],
        ("trial.2",): ["painter", "critic"],
    }
    assert {(source.users[-1], target.users[0]) for source, target in graph.edges} == {
        ("again", "trial.0"), ("again", "trial.1"), ("again", "trial.2"),
    }  # fmt: skip


def test_boxes_do_not_overlap_and_edges_lead_to_the_right(outputs: Path):
    graph = sharing_graph(compared(outputs, "*"))
    assert all(source.right < target.left for source, target in graph.edges)
    for one in graph.boxes:
        assert 0 <= one.left < one.right <= graph.width
        assert 0 <= one.top < one.top + one.height <= graph.height
        for other in graph.boxes:
            if other is not one and other.left == one.left:
                assert one.top + one.height < other.top or other.top + other.height < one.top
