"""Settings of SCE: what they refuse, and that k-means takes them whole."""

import pytest

from weakmedsam.callbacks import SubClassExploration
from weakmedsam.errors import ConfigError
from weakmedsam.sce.config import Clustering, SubClassTask
from weakmedsam.sce.kmeans import KMeans


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubClassTask(0), r"^model\.sce\.sub_classes\.number is 0"),
        (lambda: SubClassTask("auto", 0), r"^model\.sce\.sub_classes\.maximum is 0"),
        (lambda: SubClassTask("some"), r"sub_classes\.number is 'some'; it must be a whole number or auto"),
        (lambda: SubClassTask(weight=-1.0), r"^model\.sce\.sub_classes\.weight is -1"),
        (lambda: Clustering(restarts=0), r"^model\.sce\.kmeans\.restarts is 0"),
        (lambda: Clustering(seed=-1), r"^model\.sce\.kmeans\.seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused_by_key(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_head_is_as_large_as_the_number_or_as_the_largest_that_auto_can_choose():
    assert (SubClassTask(3, 5).most, SubClassTask(3, 5).automatic) == (3, False)
    assert (SubClassTask("auto", 5).most, SubClassTask("auto", 5).automatic) == (5, True)


def test_k_means_takes_the_settings_of_clustering():
    sce = SubClassExploration(kmeans=Clustering(7, True, 3, 64))
    assert sce.kmeans == KMeans(seed=7, spherical=True, restarts=3, points_per_centroid=64)
