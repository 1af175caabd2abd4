"""tools/report.py: what the page shows is so, and it needs nothing else."""
import argparse
import base64
import html.parser
import json
import os
import re
import shutil
import sys
import tarfile
import types

import cv2
import numpy as np
import pytest

import weights
from commands import finish, start
from tools import report

NETWORK = {'depth': 18, 'width': 8, 'stem': '3x3s2', 'image_size': 16}
STATS = [{'loss': 9. - epoch, 'queue_size': 4096., 'epoch_num': epoch, 'global_step': 5 * epoch}
         for epoch in (2, 3, 4)]


class Page(html.parser.HTMLParser):
    """What is in a page: by section, rows of thumbnails [(name, kind, word)], big pictures (alt)
    and text; and everything that it refers to."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.pictures, self.text, self.links, self.tags = {}, {}, {}, [], set()
        self.source, self._section, self._kind = path.read_text(encoding='utf-8'), 'head', ''
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.links += [attributes[name] for name in ('src', 'href') if name in attributes]
        rows = self.rows.setdefault(self._section, [])
        if tag == 'h2':
            self._section = attributes['id']
        elif tag == 'ul':
            rows.append([])
        elif tag == 'li':
            self._kind = attributes.get('class', '')
        elif tag == 'img' and self._kind is not None:
            rows[-1].append([attributes['alt'], self._kind, '', attributes['src']])
        elif tag == 'img':
            self.pictures.setdefault(self._section, []).append(
                (attributes['alt'], attributes['src']))
        if tag in ('h2', 'figure'):
            self._kind = None

    def handle_data(self, data):
        self.text[self._section] = self.text.get(self._section, '') + data
        if self._kind is not None and self.rows.get(self._section, [[]])[-1:] not in ([], [[]]):
            self.rows[self._section][-1][-1][2] += data.strip()


def shown_in(page):
    """The names of a page's thumbnails."""
    return {image[0] for rows in page.rows.values() for row in rows for image in row} - {''}


def decode(uri):
    kind, content = uri.split(',', 1)
    assert kind == 'data:image/jpeg;base64'
    return cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)


def write_features(folder, features, names=None, labels=None, classes=None, **made):
    """Images of one gray each, 2 i, and a features.npz that is about them."""
    names = names or [f'{i:02d}.png' for i in range(len(features))]
    for i, name in enumerate(names):
        path = folder / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode('.png', np.full([8, 12, 3], 2 * i, np.uint8))[1].tobytes())
    arrays = {} if labels is None else {'labels': np.array(labels), 'classes': np.array(classes)}
    (folder / 'run' / 'features').mkdir(parents=True, exist_ok=True)
    np.savez(str(folder / 'run' / 'features' / 'features.npz'), names=np.array(names),
             features=np.array(features, np.float32), **arrays, made=json.dumps(
                 dict({'folder': str(folder / 'images'), 'network': NETWORK}, **made)))


def run_report(folder, **flags):
    args = dict(run=str(folder / 'run'), features=None, images=None, out=None, projector=None)
    return Page(folder / report.report(argparse.Namespace(**dict(args, **flags))))


@pytest.fixture(autouse=True)
def without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)


@pytest.fixture
def features():
    return np.random.RandomState(3).rand(40, 5).astype(np.float32)


@pytest.fixture
def labelled(tmp_path, features):
    """A folder with a run of 3 epochs and features of 40 images of the classes a, b and <c>."""
    labels = [i % 3 for i in range(40)]
    write_features(tmp_path, features, None, labels, ['a', 'b', '<c>'])
    (tmp_path / 'run' / 'stats.json').write_text(json.dumps(STATS))
    return tmp_path


def test_neighbours_are_the_nearest_by_cosine(labelled, features):
    page = run_report(labelled)
    rows = page.rows['Nearest']
    cosines = np.array([[np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x in features]
                        for y in features])
    assert len(rows) == 12 and len({row[0][0] for row in rows}) == 12
    assert {int(row[0][0][:2]) % 3 for row in rows[:3]} == {0, 1, 2}
    same = 0
    for (name, kind, word, _), *others in rows:
        query = int(name[:2])
        expected = [i for i in np.argsort(-cosines[query]) if i != query][:8]
        assert (kind, word) == ('query', 'query')
        assert [int(other[0][:2]) for other in others] == expected
        assert [other[2] for other in others] == [f'{cosines[query][i]:.3f}' for i in expected]
        assert [other[1] for other in others] == [
            'same' if i % 3 == query % 3 else 'other' for i in expected]
        same += sum(other[1] == 'same' for other in others)
    assert f' {same / 96:.0%} of those shown are of its class' in page.text['Nearest']


def test_a_thumbnail_is_of_the_image_whose_name_it_has(labelled):
    for row in run_report(labelled).rows['Nearest']:
        for name, _, _, uri in row:
            pixels = decode(uri)
            assert pixels.shape == (64, 64, 3) and abs(pixels.mean() - 2 * int(name[:2])) < 2


def test_what_is_most_and_least_like_the_rest(tmp_path):
    angles = np.linspace(0, 1, 11)  # the middle one is the nearest to all others
    write_features(tmp_path, np.stack([np.cos(angles), np.sin(angles)], 1).tolist() + [[-3, -3]])
    most, least = run_report(tmp_path).rows['Most']
    assert most[0][0] == '05.png' and {row[0] for row in most[1:3]} == {'04.png', '06.png'}
    assert least[0][0] == '11.png' and {row[0] for row in least[1:3]} == {'00.png', '10.png'}
    others = np.append(np.delete(angles, 5), 1.25 * np.pi)
    assert float(most[0][2]) == pytest.approx(np.cos(0.5 - others).mean(), abs=6e-4)


def test_curves_have_their_chance_level(labelled):
    for step, top1 in ((0, 20.), (15, 31.5), (5, 25.)):
        (labelled / 'run' / f'model-{step}.knn.json').write_text(json.dumps({'knn_top1': top1}))
    (labelled / 'run' / 'model-15.head.knn.json').write_text('{"knn_top1": 99}')
    (labelled / 'run' / 'model-10.knn.json').write_text('[]')
    page = run_report(labelled)
    loss, knn = page.pictures['Curves']
    assert loss[0] == ('contrastive loss: 7 in epoch 2, 5 in epoch 4; '
                       'chance, ln(4096 + 1) = 8.318')
    assert loss[0] in page.text['Curves']
    assert knn[0] == 'kNN top-1 of checkpoints, %: 20 in epoch 0, 31.5 in epoch 3'
    for _, uri in (loss, knn):
        kind, content = uri.split(',')
        assert kind == 'data:image/svg+xml;base64' and b'<svg ' in base64.b64decode(content)


def test_configuration(labelled, monkeypatch):
    monkeypatch.setattr(weights, 'read_network', lambda path: NETWORK)
    (labelled / 'run' / 'log.log').write_text('[1 @logger.py:92] Argv: main_moco.py --lr <3>\n')
    (labelled / 'run' / 'resume-me').write_text('')
    text = run_report(labelled).text
    assert 'main_moco.py --lr <3>' in text['Configuration']
    assert 'asked to stop' in text['Configuration'] and '3x3s2' in text['Configuration']
    assert '40 of the 40 images' in text['Features'] and str(labelled) in text['Features']


def test_names_are_escaped(tmp_path, features):
    names = [f'{i:02d}.png' for i in range(40)]
    names[:3] = ['<b>&amp;".png', "it's > \n.png", os.fsdecode(b'\xff.png')]
    write_features(tmp_path, features, names)
    (tmp_path / 'run').rename(tmp_path / '<i>')
    page = run_report(tmp_path, run=str(tmp_path / '<i>'))
    shown = shown_in(page)
    assert {'<b>&amp;".png', "it's > ?.png", '?.png'} & shown
    assert not shown - set(names) - {"it's > ?.png", '?.png'}
    assert not page.tags & {'b', 'i'} and '<title>&lt;i&gt;</title>' in page.source


def test_the_page_loads_nothing(labelled):
    page = run_report(labelled)
    assert page.links and all(link.startswith(('#', 'data:image/')) for link in page.links)
    assert not page.tags & {'script', 'link', 'iframe', 'object'}
    source = re.sub('base64,[^"]*', '', page.source)
    assert not [words for words in ('//', 'url(', '@import') if words in source]
    sections = {link[1:] for link in page.links if link.startswith('#')}
    assert sections == {'Curves', 'Configuration', 'Nearest', 'Map', 'Most', 'Clusters', 'Features'}
    assert '<html lang="en">' in page.source and 'prefers-color-scheme: dark' in page.source


def test_missing_images_are_gray(labelled):
    page = run_report(labelled)
    (name, *_), (other, *_) = page.rows['Nearest'][0][:2]
    (labelled / 'images' / name).unlink()
    (labelled / 'images' / other).write_bytes(b'\x89PNG cut off')
    page = run_report(labelled)
    for image in page.rows['Nearest'][0][:2]:
        assert (decode(image[3]) == 128).all()
    assert '2 of those shown cannot be read' in page.text['Features']


def test_images_in_tar_files_are_shown(labelled):
    before = run_report(labelled)
    with tarfile.open(str(labelled / 'images.tar'), 'w') as tar:
        tar.add(str(labelled / 'images'), 'images')
    shutil.rmtree(str(labelled / 'images'))
    assert run_report(labelled).rows == before.rows


def test_nothing_outside_the_folder_is_read(tmp_path, features):
    write_features(tmp_path, features[:2], ['../secret.png', 'a.png'])
    assert (tmp_path / 'secret.png').exists()
    assert '1 of those shown cannot be read' in run_report(tmp_path).text['Features']


def test_without_labels_nothing_is_said_of_classes(tmp_path, features):
    write_features(tmp_path, features)
    page = run_report(tmp_path)
    assert {image[1] for row in page.rows['Nearest'] for image in row} == {'query', ''}
    assert 'class' not in page.text['Nearest'] and not page.rows['Map']
    write_features(tmp_path, features, None, [0] * 39 + [1], ['a', '<b>'])
    page = run_report(tmp_path)
    assert [image[2] for image in page.rows['Map'][0]] == ['a', '<b>']
    assert '39.png' in [row[0][0] for row in page.rows['Nearest']]  # the only one of its class


def test_a_map_shows_images_where_they_are():
    thumbnails = {i: np.full([64, 64, 3], 10 * i, np.uint8) for i in range(5)}
    # 3 and 4 are in one cell, and 4 is nearer to its middle
    positions = np.array([[0, 0], [24, 0], [24, 16], [12.3, 8], [12.7, 8.4]])
    picture = report.draw_map(positions, thumbnails, [[200 + i] * 3 for i in range(5)])
    assert picture.shape == (640, 960, 3) and (picture[300, 100] == 235).all()
    for i, (left, top) in ((0, (0, 0)), (1, (920, 0)), (2, (920, 600)), (4, (480, 320))):
        cell = picture[top:top + 40, left:left + 40]
        assert (cell[3:-3, 3:-3] == 10 * i).all() and (cell[:3] == 200 + i).all()
    assert set(np.unique(picture)) == {0, 10, 20, 40, 200, 201, 202, 204, 235}


def test_the_map_of_the_page_is_of_principal_components(labelled, features, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, 'draw_map', lambda positions, *_: drawn.append(positions) or
                        np.zeros([8, 8, 3], np.uint8))
    words = run_report(labelled).pictures['Map'][0][0]
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    u, lengths, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(abs(drawn[0]), abs(u[:, :2] * lengths[:2]), atol=1e-5)
    share = (lengths[:2] ** 2).sum() / (lengths ** 2).sum()
    assert words == f'PCA: the two directions of most variance, {share:.0%} of it'


def test_clusters_and_another_map_with_scikit_learn(labelled, monkeypatch):
    class KMeans:
        def __init__(self, k, **_):
            assert k == 3

        def fit(self, rows):
            self.labels_ = np.array([0] * 10 + [1] * 30)
            self.cluster_centers_ = np.stack([rows[4], rows[20]])
            return self

    class TSNE(KMeans):
        def __init__(self, **_):
            pass

        def fit_transform(self, rows):
            return rows[:, :2]
    modules = {'cluster': types.SimpleNamespace(KMeans=KMeans),
               'manifold': types.SimpleNamespace(TSNE=TSNE)}
    monkeypatch.setitem(sys.modules, 'sklearn', types.SimpleNamespace(**modules))
    page = run_report(labelled)
    assert [row[0][0] for row in page.rows['Clusters']] == ['20.png', '04.png']
    assert [len(row) for row in page.rows['Clusters']] == [9, 9]
    assert 'Cluster 1: 30 images, 33% of them' in page.text['Clusters']
    assert [words.split(':')[0] for words, _ in page.pictures['Map']] == ['PCA', 't-SNE']


def test_with_the_real_scikit_learn(labelled, monkeypatch):
    monkeypatch.delitem(sys.modules, 'sklearn')
    pytest.importorskip('sklearn')
    page = run_report(labelled)
    assert len(page.rows['Clusters']) == 3 and len(page.pictures['Map']) == 2


def test_without_scikit_learn_the_page_says_so(labelled):
    page = run_report(labelled)
    assert 'pip install scikit-learn' in page.text['Clusters']
    assert len(page.pictures['Map']) == 1


def test_of_many_images_a_sample_is_shown(labelled, features, monkeypatch):
    monkeypatch.setattr(report, 'SAMPLE', 15)
    pages = [run_report(labelled) for _ in range(2)]
    assert '15 of the 40 images' in pages[0].text['Features']
    shown, again = [shown_in(page)
                    for page in pages]
    assert shown == again and len(shown) == 15
    sample = sorted(int(name[:2]) for name in shown)  # and the rows are theirs
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    (name, *_), (nearest, _, cosine, _) = pages[0].rows['Nearest'][0][:2]
    cosines = {i: rows[i] @ rows[int(name[:2])] for i in sample if i != int(name[:2])}
    assert int(nearest[:2]) == max(cosines, key=cosines.get)


def test_without_features_there_are_curves(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'stats.json').write_text(json.dumps(STATS))
    page = run_report(tmp_path, out=str(tmp_path / 'x.html'))
    assert list(page.pictures) == ['Curves'] and 'Nearest' not in page.text


def test_projector_files_belong_together(labelled, features):
    folder = labelled / 'projector'
    run_report(labelled, projector=str(folder))
    table = np.loadtxt(str(folder / 'tensors.tsv'), delimiter='\t')
    np.testing.assert_allclose(
        table, features / np.linalg.norm(features, axis=1, keepdims=True), atol=1e-4)
    head, *lines = (folder / 'metadata.tsv').read_text().splitlines()
    assert head == 'name\tclass' and len(lines) == 40 and lines[5] == '05.png\t<c>'
    sprite = cv2.imread(str(folder / 'sprite.png'))
    assert sprite.shape == (7 * 64, 7 * 64, 3)
    for i in range(40):
        assert (sprite[i // 7 * 64:i // 7 * 64 + 64, i % 7 * 64:i % 7 * 64 + 64] == 2 * i).all()
    text = (folder / 'projector_config.pbtxt').read_text()
    assert text.count('single_image_dim: 64') == 2
    run_report(labelled, projector=str(folder))  # again
    (folder / 'projector_config.pbtxt').unlink()
    with pytest.raises(ValueError, match='metadata.tsv: is there, and is no'):
        run_report(labelled, projector=str(folder))


def test_tensorboard_reads_the_config(labelled):
    pytest.importorskip('tensorboard')
    from google.protobuf import text_format
    from tensorboard.plugins.projector import ProjectorConfig
    run_report(labelled, projector=str(labelled / 'projector'))
    config = text_format.Parse(
        (labelled / 'projector' / 'projector_config.pbtxt').read_text(), ProjectorConfig())
    assert config.embeddings[0].tensor_path == 'tensors.tsv'
    assert list(config.embeddings[0].sprite.single_image_dim) == [64, 64]


def test_a_page_is_replaced_but_no_other_file(labelled):
    out = labelled / 'run' / 'report.html'
    out.write_text('mine')
    with pytest.raises(ValueError, match='report.html: is there, and is no report'):
        run_report(labelled)
    assert out.read_text() == 'mine'
    out.unlink()
    (labelled / 'run' / 'stats.json').write_text(json.dumps(STATS[:2]))
    assert '2 epochs' in run_report(labelled).source
    (labelled / 'run' / 'stats.json').write_text(json.dumps(STATS))
    assert '3 epochs' in run_report(labelled).source
    assert sorted(os.listdir(str(labelled / 'run'))) == ['features', 'report.html', 'stats.json']


def test_mistakes(labelled, monkeypatch):
    path = labelled / 'run' / 'features' / 'features.npz'
    with pytest.raises(ValueError, match='gone, with the images of .*--images'):
        (labelled / 'images').rename(labelled / 'moved')
        run_report(labelled)
    assert '0 epochs' not in run_report(labelled, images=str(labelled / 'moved')).source
    monkeypatch.setattr(weights, 'read_network', lambda path: dict(NETWORK, width=64))
    with pytest.raises(ValueError, match='is of --width 8, but .*run of --width 64'):
        run_report(labelled, images=str(labelled / 'moved'))
    for features, words in ((np.zeros([2, 3, 4]), 'no result of embed.py: 2 names'),
                            (np.zeros([3, 4]), '2 names, and features of shape'),
                            (np.full([2, 4], np.nan), 'not finite')):
        write_features(labelled, features, ['a.png', 'b.png'][:2] + ['c'] * (len(features) - 3))
        with pytest.raises(ValueError, match=words):
            run_report(labelled)
    for content in (b'', b'text', path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='features.npz: '):
            run_report(labelled)
    with pytest.raises(ValueError, match='nowhere/features.npz: cannot be read: No such file'):
        run_report(labelled, features='nowhere')


def test_a_mistake_gets_one_line(tmp_path):
    process = start('tools/report.py', str(tmp_path))
    _, errors = finish(process)
    line, = errors.splitlines()
    assert process.returncode == 1 and line.startswith('report.py: error: ')
    assert 'features.npz: is not there' in line and 'nor has' in line
    assert not os.listdir(str(tmp_path))
