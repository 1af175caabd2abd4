"""outputs.py: what is never written over, and files that appear whole."""
import os

import pytest

import outputs
from errors import UserError


def is_ours(path):
    return open(path).read().startswith('ours')


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'ours').write_text('ours')
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'mine').write_text('mine')
    (tmp_path / 'folder').mkdir()
    os.mkfifo(str(tmp_path / 'fifo'))
    for name in ('ours', 'mine', 'loop', 'nothing', '/dev/null'):
        (tmp_path / ('to-' + os.path.basename(name))).symlink_to(
            'to-loop' if name == 'loop' else name)
    return tmp_path


@pytest.mark.parametrize('name', ['ours', 'empty', 'new', 'to-ours', 'to-nothing'])
def test_what_may_be_written(folder, name):
    before = sorted(os.listdir(str(folder)))
    outputs.check_output(str(folder / name), is_ours)
    assert sorted(os.listdir(str(folder))) == before
    with outputs.replace(str(folder / name)) as path:
        with open(path, 'w') as f:
            f.write('ours too')
    assert (folder / name).read_text() == 'ours too'
    assert (folder / name).is_symlink() == name.startswith('to-')
    assert {n for n in os.listdir(str(folder)) if n not in before} <= {name, 'nothing'}


@pytest.mark.parametrize('name, words', [
    ('mine', 'is there, and is no picture: it is not replaced'),
    ('to-mine', 'is there, and is no picture: it is not replaced'),
    ('folder', 'is no regular file: nothing there is replaced'),
    ('fifo', 'is no regular file'), ('to-null', 'is no regular file'),
    ('/dev/null', 'is no regular file'), ('/dev/stdout', 'is no regular file'),
    ('/dev/fd/1', 'is no regular file'), ('', 'is no regular file'),
    ('to-loop', 'cannot be written: Too many levels'),
    ('none/new', 'cannot be written: No such file'), ('mine/new', 'cannot be written: Not a dir')])
def test_what_may_not(folder, name, words):
    path = os.path.join(str(folder), name)
    before = sorted(os.listdir(str(folder)))
    with pytest.raises(UserError) as error:
        outputs.check_output(path, is_ours, '--out', 'picture')
    assert str(error.value).startswith('--out ' + path + ': ' + words)
    assert sorted(os.listdir(str(folder))) == before and (folder / 'mine').read_text() == 'mine'


def test_a_failure_leaves_what_was_there(folder):
    before = sorted(os.listdir(str(folder)))
    with pytest.raises(ZeroDivisionError):
        with outputs.replace(str(folder / 'ours')) as path:
            with open(path, 'w') as f:
                f.write('half')
            1 / 0
    assert (folder / 'ours').read_text() == 'ours' and sorted(os.listdir(str(folder))) == before
