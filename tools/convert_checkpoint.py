#!/usr/bin/env python
"""Convert weights between formats; each takes seconds.

    python tools/convert_checkpoint.py train_log/moco_v2 moco_v2.npz             # newest checkpoint
    python tools/convert_checkpoint.py moco_v2.npz runs/released/model-0         # for --load
    python tools/convert_checkpoint.py moco_v2_800ep_pretrain.pth.tar moco_v2.npz
    python tools/convert_checkpoint.py moco_v2.npz moco_v2.pth.tar               # official MoCo
    python tools/convert_checkpoint.py moco_v2.npz resnet50.pth                  # torchvision
    python tools/convert_checkpoint.py moco_v2.npz backbone.npz --backbone-only
    python tools/convert_checkpoint.py moco_v2.npz detectron2.pkl
    python tools/convert_checkpoint.py moco_v2.npz fasterrcnn.npz --fasterrcnn   # of tensorpack
    python tools/convert_checkpoint.py moco_v2.npz resnet50.onnx                 # needs onnx
    python tools/convert_checkpoint.py moco_v2.npz resnet50.savedmodel           # a folder

The content of SRC tells its format, the ending of DST the one to write; without an ending it is a
checkpoint of TensorFlow. A file must hold all of a ResNet (of any --depth and --width of
main_moco.py), and of each other part of MoCo, or a classifier, that it has. What has no place here
or in DST's format is listed.

detectron2 has to be told INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN [123.675, 116.28, 103.53],
MODEL.PIXEL_STD [58.395, 57.12, 57.375] and MODEL.RESNETS.STRIDE_IN_1X1 False. tensorpack's
FasterRCNN takes BGR, as the weights here do. ONNX and SavedModel take `images`, RGB 0..255
[N, H, W, 3] of any size, normalise them, and give `features` [N, D].
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # errors only; TensorFlow reads this while it is loaded
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import argparse
import collections
import pickle
import re

import numpy as np

import checkpoints
import outputs
import resnet
import weights
from errors import UserError, enumerate_some, one_line
from tools import pytorch_format
from tools.export_model import MARK, settle, write_onnx, write_saved_model


def describe(arrays):
    """Guess the network from the names of its weights.

    Args:
        arrays: dict of our name -> array, perhaps not complete.

    Returns:
        (depth, dict): of the ResNet with the most similar names; our name -> shape of all variables
        of a network with the same parts.
    """
    stem = arrays.get('conv0/W', np.empty(0))
    kernel, _, _, width = stem.shape if stem.ndim == 4 else (7, 7, 3, 64)
    names = set(filter(weights.is_backbone, arrays))
    depth = min(resnet.DEPTHS, key=lambda depth: len(
        names ^ {name for name, _ in pytorch_format.list_variables(depth)}))
    variables = pytorch_format.list_variables(depth, width, kernel)
    shapes = dict(variables)
    dim = variables[-1][1][-1]  # D

    has_key_encoder = any(name.startswith('momentum_encoder/') for name in arrays)
    has_queue = 'queue' in arrays or 'queue_ptr' in arrays
    is_moco = has_key_encoder or has_queue
    if any(name.startswith('linear/') for name in arrays) and not is_moco:
        classes = np.shape(arrays.get('linear/b'))[0:1] or (1000,)
        shapes.update({'linear/W': (dim,) + classes, 'linear/b': classes})
    for i, out in enumerate(weights.head_dims(arrays) or ([128] if is_moco else [])):
        layer = f'linear{i}_{out}'
        shapes.update({layer + '/W': (dim, out), layer + '/b': (out,)})
        dim = out
    if has_key_encoder:
        shapes.update({'momentum_encoder/' + name: shape for name, shape in shapes.items()})
    if has_queue:
        keys = np.shape(arrays.get('queue'))[0:1] or (65536,)
        shapes.update(queue=keys + (dim,), queue_ptr=())
    return depth, shapes


def convert(src, dst, backbone_only=False, fasterrcnn=False, part=None, stem=None,
            input_type=None):
    """Convert a file of weights.

    Args:
        src: as in weights.find_checkpoint().
        dst: file to write; its ending says how.
        backbone_only: leave out head, classifier, key encoder and queue.
        fasterrcnn: write the names of tensorpack's FasterRCNN; `dst` must be an .npz.
        part: of a file of PyTorch with several networks, as in pytorch_format.read().
        stem, input_type: for ONNX and SavedModel, as --stem and --input.

    Returns:
        (depth, kept, dropped): of the ResNet; our names in dst; names without a place there.

    Raises:
        UserError: src does not exist, or is not a complete network; dst cannot be written, or is
        something else.
    """
    dst = re.sub(r'\.savedmodel/+$', '.savedmodel', dst)
    write, takes = tell_writer(dst, backbone_only, fasterrcnn)
    is_export = write in (write_onnx, write_saved_model)
    if (stem or input_type) and not is_export:
        raise UserError(f'{dst}: --stem and --input are of .onnx and .savedmodel')
    src = weights.find_checkpoint(src)
    if os.path.realpath(src) == os.path.realpath(dst):
        raise UserError(f'{src}: is what would be read and written')
    if part and not (os.path.isfile(src) and weights.tell_format(src) == 'pytorch'):
        raise UserError(f'{src}: --part is of a file of PyTorch, which this is not')
    arrays, dropped = weights.read(
        src, is_wanted, lambda path, wanted: read_pytorch(path, wanted, part))
    network = {name: arrays.pop(name) for name in [weights.NETWORK] if name in arrays}
    depth, shapes = describe(arrays)
    problems = weights.compare(arrays, shapes) or weights.find_dead(arrays)
    if problems:
        whole = 'MoCo' if 'queue' in shapes else 'one network'
        raise UserError(f'{src}: is not all of {whole} on a ResNet-{depth}, and nothing else: '
                        + enumerate_some(problems, '; '))
    if write is write_moco and not {'queue', 'momentum_encoder/conv0/W'} <= set(arrays):
        raise UserError(f'{src}: has no key encoder and queue, which a .pth.tar of MoCo holds; '
                        f'write a .pth instead of {dst}')

    kept = {name: array for name, array in arrays.items() if takes(name)}
    has_place = write in (write_npz, write_moco, write_tensorflow)
    content = dict(kept, **network) if has_place else kept
    how = [depth] if not is_export else [
        *settle(src, kept, depth, network.get(weights.NETWORK), stem), input_type or 'uint8']
    try:
        os.makedirs(os.path.dirname(dst) or '.', exist_ok=True)
        check_destination(dst, write)
        # a folder, or several files, to which TensorFlow gives their names last
        if write in (write_saved_model, write_tensorflow):
            write(content, dst, *how)
        else:
            with outputs.replace(dst) as path:
                write(content, path, *how)
    except (OSError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
        raise UserError(f'{dst}: cannot be written: {error}')
    return depth, sorted(kept), sorted(set(arrays) - set(kept)) + sorted(dropped)


# ---- reading

def is_wanted(name):
    """Whether it is read: not what Tensorpack saves of a training besides, nor the optimizer's."""
    return name == weights.NETWORK or weights.is_model(name) and not re.match(
        'EMA/|learning_rate$', name)


def read_pytorch(path, wanted, part):
    """Read a file of PyTorch, by the Python that TORCH_PYTHON names if this one has no PyTorch."""
    try:
        pytorch_format.import_pytorch('reading', path)
    except UserError:
        if not os.environ.get('TORCH_PYTHON'):
            raise
        if part:
            raise UserError(f'{path}: --part needs a Python that has PyTorch: $TORCH_PYTHON '
                            f'tools/convert_checkpoint.py {path} out.npz --part {part}')
        return weights.read_pytorch(path, wanted)
    return pytorch_format.read(path, part)


# ---- writing

def tell_writer(dst, backbone_only, fasterrcnn):
    """How to write a file of this name.

    Returns:
        A function of dict of our name -> array, path and depth (in export_model.py, of more than
        depth); and a predicate on our names: whether the file has a place for them.
    """
    def everything(name):
        return True

    def classifier(name):
        return weights.is_backbone(name) or name.startswith('linear/')

    writers = collections.OrderedDict([
        ('.npz', (write_npz, everything)), ('.pth.tar', (write_moco, everything)),
        ('.pth', (write_torchvision, classifier)), ('.pt', (write_torchvision, classifier)),
        ('.pkl', (write_detectron2, weights.is_backbone)),
        ('.onnx', (write_onnx, weights.is_backbone)),
        ('.savedmodel', (write_saved_model, weights.is_backbone)),
        ('', (write_tensorflow, everything))])
    if os.path.isdir(dst) and not dst.endswith('.savedmodel') or not os.path.basename(dst):
        raise UserError(f'{dst}: is a folder; name the checkpoint too, '
                        f'{os.path.join(dst, "model-0")} say')
    ending = '.pth.tar' if dst.endswith('.pth.tar') else os.path.splitext(dst)[1]
    if ending not in writers:
        raise UserError(f'{dst}: has none of the endings {", ".join(filter(None, writers))}; '
                        'a checkpoint of TensorFlow has none')
    if fasterrcnn:
        if ending != '.npz':
            raise UserError(f'{dst}: what --fasterrcnn writes ends in .npz')
        return write_fasterrcnn, weights.is_backbone
    write, takes = writers[ending]
    if backbone_only:
        if write is write_moco:
            raise UserError(f'{dst}: --backbone-only leaves nothing to call MoCo; write a .pth')
        takes = weights.is_backbone
    return write, takes


def check_destination(dst, write):
    """A UserError if there is anything but what was written in this way before."""
    if write is write_tensorflow:
        outputs.check_output(dst, lambda path: True)  # no device, say
        for ending in ('.index', '.data-00000-of-00001'):
            outputs.check_output(dst + ending, lambda path: checkpoints.is_whole(dst))
        outputs.check_output(os.path.join(os.path.dirname(dst), 'checkpoint'),
                             outputs.contains(b'model_checkpoint_path'))
        return
    if write in (write_torchvision, write_moco):
        pytorch_format.import_pytorch('writing', dst)
    # names of the first layer, or what only this writes: all are in the file as they are
    mark = {write_detectron2: b'matching_heuristics', write_npz: b'conv0/W.npy',
            write_fasterrcnn: b'conv0/W.npy', write_onnx: MARK}.get(write, b'conv1.weight')
    outputs.check_output(dst, outputs.contains(mark), what='file of weights')


def write_npz(arrays, path, depth):
    np.savez(path, **arrays)


def write_fasterrcnn(arrays, path, depth):
    np.savez(path, **{name.replace('_bn/', '/bn/'): array for name, array in arrays.items()})


def write_detectron2(arrays, path, depth):
    model = {detectron2_name(name): pytorch_format.to_pytorch(name, array)
             for name, array in arrays.items()}
    content = pickle.dumps(
        {'model': model, '__author__': 'MoCo', 'matching_heuristics': True}, protocol=3)
    with open(path, 'wb') as f:
        # NumPy 1 has no numpy._core, and both have numpy.core
        f.write(content.replace(b'cnumpy._core.', b'cnumpy.core.'))


def detectron2_name(name):
    """detectron2's name of a backbone's variable."""
    group, block, conv, is_bn, variable = pytorch_format.split_name(name)
    if group is None:
        layer = 'stem.conv1'
    else:
        layer = f'res{group + 2}.{block}.' + ('shortcut' if conv == 'shortcut' else f'conv{conv}')
    return layer + ('.norm.' if is_bn else '.') + variable


def write_torchvision(arrays, path, depth):
    save_pytorch(arrays, pytorch_format.classifier_names(), lambda state: state, path)


def write_moco(arrays, path, depth):
    names = pytorch_format.moco_names(weights.head_dims(arrays))
    extra = {weights.NETWORK: arrays.pop(weights.NETWORK).tobytes().decode()
             } if weights.NETWORK in arrays else {}
    save_pytorch(arrays, {ours: 'module.' + theirs for ours, theirs in names.items()},
                 lambda state: dict(extra, arch=f'resnet{depth}', state_dict=state), path)


def save_pytorch(arrays, names, wrap, path):
    import torch
    state = collections.OrderedDict(
        (names[name], torch.from_numpy(pytorch_format.to_pytorch(name, array)))
        for name, array in arrays.items())
    torch.save(wrap(state), path)


def write_tensorflow(arrays, path, depth):
    """Write a checkpoint, and the file `checkpoint` that makes its folder mean it."""
    tf = checkpoints.import_tensorflow('writing', path)
    latest = checkpoints.find_latest(os.path.dirname(path) or '.')
    if latest is not None and os.path.realpath(latest) != os.path.realpath(path):
        raise UserError(f'{path}: this folder holds {os.path.basename(latest)} already, of another '
                        'run perhaps')
    # the op behind tf.train.Saver: variables and a graph of them would take seconds
    with tf.Graph().as_default(), tf.Session(
            config=tf.ConfigProto(device_count={'GPU': 0})) as sess:
        tensors = [tf.placeholder(array.dtype, array.shape) for array in arrays.values()]
        save = tf.raw_ops.SaveV2(prefix=path, tensor_names=list(arrays),
                                 shape_and_slices=[''] * len(arrays), tensors=tensors)
        try:
            sess.run(save, dict(zip(tensors, arrays.values())))
        except tf.errors.OpError as error:
            raise OSError(one_line(error))
    checkpoints.write_pointer([path])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='a checkpoint, its folder (the newest one is '
                        'taken), an .npz or a file of PyTorch')
    parser.add_argument('dst', metavar='DST', help='file to write: .npz; .pth.tar (official MoCo); '
                        '.pth or .pt (torchvision); .pkl (detectron2); .onnx; .savedmodel (a '
                        'folder); without an ending, a checkpoint of TensorFlow')
    parser.add_argument('--backbone-only', action='store_true',
                        help='leave out head, classifier, key encoder and queue')
    parser.add_argument('--fasterrcnn', action='store_true',
                        help="write an .npz for tensorpack's FasterRCNN")
    parser.add_argument('--part', metavar='NAME', help='of several networks in a file of PyTorch, '
                        'the one whose names begin with this or have it as a word: teacher, say')
    parser.add_argument('--stem', choices=list(resnet.STEMS), help='for .onnx and .savedmodel, if '
                        'SRC does not tell: its first layer')
    parser.add_argument('--input', choices=['uint8', 'float'], help='for .onnx and .savedmodel: '
                        'type of the images (uint8)')
    args = parser.parse_args(argv)
    try:
        depth, kept, dropped = convert(args.src, args.dst, args.backbone_only,
                                       args.fasterrcnn, args.part, args.stem, args.input)
    except UserError as error:
        sys.exit(f'convert_checkpoint.py: error: {error}')
    for name in dropped:
        print(f'dropped: {name}')
    print(f'{args.dst}: {len(kept)} variables, ResNet-{depth}; {len(dropped)} dropped')


if __name__ == '__main__':
    main()
