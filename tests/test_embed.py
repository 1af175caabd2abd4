"""embed.py: the features of each image once, under its own name."""
import csv
import json

import numpy as np
import pytest

import embed
import image_lists
from commands import MOCO, finish, run, start, write_images
from errors import UserError
from test_tar_files import write_shards


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """images, a run on them, and f1, f2: their features by one rank and by two, in small batches;
    of train/ one image cannot be read."""
    folder = tmp_path_factory.mktemp('embed')
    images = write_images(folder / 'images', 150, 20)
    (folder / 'images' / 'train' / 'g' / '04.jpg').write_bytes(b'\xff\xd8\xff\xe0 cut off')
    run('main_moco.py', '--data', images, *MOCO, '--max-steps', 0, '--logdir', folder / 'run')
    common = ['--load', folder / 'run', '--data', images]
    run('embed.py', *common, '--out', folder / 'f1', '--format', 'csv')
    run('embed.py', *common, '--out', folder / 'f2', '--batch', 7, ranks=2)
    run('embed.py', *common, '--out', folder / 'val', '--split', 'val')
    (folder / 'mixed').mkdir()
    for path in (folder / 'images' / 'val').glob('*/*.jpg'):
        (folder / 'mixed' / path.name).write_bytes(path.read_bytes())
    run('embed.py', '--load', folder / 'run', '--data', folder / 'mixed', '--out', folder / 'flat')
    return folder


def read(folder, name):
    with np.load(str(folder / name / 'features.npz')) as file:
        return dict(file)


def test_each_image_has_its_features(folder):
    one, two = read(folder, 'f1'), read(folder, 'f2')
    assert one['features'].dtype == np.float32 and one['features'].shape == (149, 64)
    names = [f'{"bgr"[i % 3]}/{i:02d}.jpg' for i in range(150) if i != 4]
    assert one['names'].tolist() == two['names'].tolist() == sorted(names)
    np.testing.assert_allclose(one['features'], two['features'], atol=1e-4)
    # what took the unreadable one's place is not under its name, nor twice
    assert len(np.unique(one['features'], axis=0)) == 149


def test_labels_are_those_of_class_folders(folder):
    one = read(folder, 'f1')
    assert one['classes'].tolist() == ['b', 'g', 'r']
    assert [one['classes'][label] for label in one['labels']] == [
        name[0] for name in one['names'].tolist()]
    assert 'labels' not in read(folder, 'flat')


def test_labels_are_the_class_numbers_of_shards(tmp_path):
    write_shards(tmp_path)
    labels, classes = embed.find_labels(image_lists.list_images(str(tmp_path)))
    assert labels.tolist() == [2, 0, 1, 1, 2] and classes == ['2', '9', '10']
    write_shards(tmp_path, numbers=(2, 9, None))
    with pytest.raises(UserError, match='000000.tar/2.png: has no class number'):
        embed.find_labels(image_lists.list_images(str(tmp_path)))


def test_the_file_says_what_made_it(folder):
    made = json.loads(str(read(folder, 'f1')['made']))
    assert made['load'] == str(folder / 'run' / 'model-0')
    assert made['folder'] == str(folder / 'images' / 'train')
    assert (made['images'], made['unreadable'], made['split']) == (150, 1, 'train')
    assert made['network']['stem'] == '3x3s2'


def test_another_folder_with_the_same_images_has_the_same_features(folder):
    val, flat = read(folder, 'val'), read(folder, 'flat')
    rows = {name.rpartition('/')[2]: row for name, row in zip(val['names'].tolist(),
                                                              val['features'])}
    assert len(rows) == 20
    for name, row in zip(flat['names'].tolist(), flat['features']):
        np.testing.assert_allclose(row, rows[name], atol=1e-4)


def test_csv_has_the_same_rows(folder):
    one = read(folder, 'f1')
    with open(str(folder / 'f1' / 'features.csv'), newline='') as f:
        head, *rows = csv.reader(f)
    assert head[:3] == ['name', 'label', 'f0'] and len(rows) == 149
    assert [row[0] for row in rows] == one['names'].tolist()
    assert [row[1] for row in rows] == [name[0] for name in one['names'].tolist()]
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), one['features'],
                               rtol=1e-6)


def test_more_rows_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'CHUNK', 4)
    rows, expected = embed.Rows(str(tmp_path), 11, 3), np.random.rand(11, 3).astype(np.float32)
    for indices in ([10, 0, 3], [4, 5], [8]):
        rows.write(np.array(indices), expected[indices])
    embed.write_npz(str(tmp_path / 'x.npz'), rows, {'names': np.array(['a'])})
    with np.load(str(tmp_path / 'x.npz')) as file:
        np.testing.assert_array_equal(file['features'], expected[[0, 3, 4, 5, 8, 10]])
        assert file['names'].tolist() == ['a']
    np.testing.assert_array_equal(list(rows), expected[[0, 3, 4, 5, 8, 10]])


def test_parquet_has_the_same_rows(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    rows, expected = embed.Rows(str(tmp_path), 3, 2), np.random.rand(3, 2).astype(np.float32)
    rows.write(np.arange(3), expected)
    embed.write_parquet(str(tmp_path / 'x.parquet'), rows, ['a', 'b', 'c'], ['k', '', 'l'])
    table = parquet.read_table(str(tmp_path / 'x.parquet')).to_pydict()
    assert table['name'] == ['a', 'b', 'c'] and table['label'] == ['k', None, 'l']
    np.testing.assert_array_equal(np.array(table['features'], np.float32), expected)


@pytest.mark.parametrize('flags, words', [
    (['--out', 'images'], 'images/features.npz: is there, and is no file of this kind'),
    (['--out', 'file'], '--out file: cannot be written'),
    (['--out', 'x', '--stem', '3x3'], 'are of --stem 3x3s2')])
def test_a_mistake_gets_one_line(folder, flags, words):
    (folder / 'images' / 'features.npz').write_text('mine')
    (folder / 'file').write_text('mine')
    process = start('embed.py', '--load', 'run', '--data', 'images', *flags, cwd=str(folder))
    _, errors = finish(process)
    (folder / 'images' / 'features.npz').unlink()
    line, = errors.splitlines()
    assert process.returncode == 1 and words in line
