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

The content of SRC tells its format, the ending of DST the one to write; without an ending it is a
checkpoint of TensorFlow. A file must hold all of a ResNet (of any --depth and --width of
main_moco.py), perhaps with a contrastive head or a classifier, or all of MoCo, and nothing else.
Variables without a place in DST's format are listed.

detectron2 has to be told INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN [123.675, 116.28, 103.53],
MODEL.PIXEL_STD [58.395, 57.12, 57.375] and MODEL.RESNETS.STRIDE_IN_1X1 False. tensorpack's
FasterRCNN takes BGR, as the weights here do.
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # errors only; TensorFlow reads this while it is loaded
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import argparse
import collections
import json
import pickle

import numpy as np

import resnet
import weights
from errors import UserError, one_line
from tools import pytorch_format


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

    is_moco = any(name.startswith(('momentum_encoder/', 'queue')) for name in arrays)
    if any(name.startswith('linear/') for name in arrays) and not is_moco:
        classes = np.shape(arrays.get('linear/b'))[0:1] or (1000,)
        shapes.update({'linear/W': (dim,) + classes, 'linear/b': classes})
    for i, out in enumerate(weights.head_dims(arrays) or ([128] if is_moco else [])):
        layer = f'linear{i}_{out}'
        shapes.update({layer + '/W': (dim, out), layer + '/b': (out,)})
        dim = out
    if is_moco:
        shapes.update({'momentum_encoder/' + name: shape for name, shape in shapes.items()})
        keys = np.shape(arrays.get('queue'))[0:1] or (65536,)
        shapes.update(queue=keys + (dim,), queue_ptr=())
    return depth, shapes


def convert(src, dst, backbone_only=False, fasterrcnn=False):
    """Convert a file of weights.

    Args:
        src: as in weights.find_checkpoint().
        dst: file to write; its ending says how.
        backbone_only: leave out head, classifier, key encoder and queue.
        fasterrcnn: write the names of tensorpack's FasterRCNN; `dst` must be an .npz.

    Returns:
        (depth, kept, dropped): of the ResNet; our names in dst; names without a place there.

    Raises:
        UserError: src does not exist, or is not a complete network; dst cannot be written.
    """
    write, takes = tell_writer(dst, backbone_only, fasterrcnn)
    src = weights.find_checkpoint(src)
    if os.path.realpath(src) == os.path.realpath(dst):
        raise UserError(f'{src}: is what would be read and written')
    arrays, dropped = weights.read(src, weights.is_model, read_pytorch)
    depth, shapes = describe(arrays)
    problems = weights.compare(arrays, shapes)
    if problems:
        network = 'MoCo' if 'queue' in shapes else 'one network'
        raise UserError(f'{src}: is not all of {network} on a ResNet-{depth}, and nothing else:'
                        + ''.join('\n  ' + problem for problem in problems))
    if write is write_moco and 'queue' not in arrays:
        raise UserError(f'{src}: has no key encoder and queue, which a .pth.tar of MoCo holds; '
                        f'write a .pth instead of {dst}')

    kept = {name: array for name, array in arrays.items() if takes(name)}
    try:
        os.makedirs(os.path.dirname(dst) or '.', exist_ok=True)
        write(kept, dst, depth)
    except (OSError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
        raise UserError(f'{dst}: cannot be written: {error}')
    return depth, sorted(kept), sorted(set(arrays) - set(kept)) + sorted(dropped)


# ---- reading

def read_pytorch(path, wanted):
    """Read a file of PyTorch, by the Python that TORCH_PYTHON names if this one has no PyTorch."""
    try:
        pytorch_format.import_pytorch('reading', path)
    except UserError:
        if not os.environ.get('TORCH_PYTHON'):
            raise
        return weights.read_pytorch(path, wanted)
    return pytorch_format.read(path)


# ---- writing

def tell_writer(dst, backbone_only, fasterrcnn):
    """How to write a file of this name.

    Returns:
        A function of dict of our name -> array, path and depth; and a predicate on our names:
        whether the file has a place for them.
    """
    def everything(name):
        return True

    def classifier(name):
        return weights.is_backbone(name) or name.startswith('linear/')

    writers = collections.OrderedDict([
        ('.npz', (write_npz, everything)), ('.pth.tar', (write_moco, everything)),
        ('.pth', (write_torchvision, classifier)), ('.pt', (write_torchvision, classifier)),
        ('.pkl', (write_detectron2, weights.is_backbone)), ('', (write_tensorflow, everything))])
    if os.path.isdir(dst) or not os.path.basename(dst):
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
    save_pytorch(arrays, {ours: 'module.' + theirs for ours, theirs in names.items()},
                 lambda state: {'arch': f'resnet{depth}', 'state_dict': state}, path)


def save_pytorch(arrays, names, wrap, path):
    torch = pytorch_format.import_pytorch('writing', path)
    state = collections.OrderedDict(
        (names[name], torch.from_numpy(pytorch_format.to_pytorch(name, array)))
        for name, array in arrays.items())
    torch.save(wrap(state), path)


def write_tensorflow(arrays, path, depth):
    """Write a checkpoint, and the file `checkpoint` that makes its folder mean it."""
    tf = weights.import_tensorflow('writing', path)
    folder = os.path.dirname(path) or '.'
    latest = tf.train.latest_checkpoint(folder)
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
    with open(os.path.join(folder, 'checkpoint'), 'w') as f:  # so that the folder can be moved
        f.write(f'model_checkpoint_path: {json.dumps(os.path.basename(path))}\n')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='a checkpoint, its folder (the newest one is '
                        'taken), an .npz or a file of PyTorch')
    parser.add_argument('dst', metavar='DST', help='file to write: .npz; .pth.tar (official MoCo); '
                        '.pth or .pt (torchvision); .pkl (detectron2); without an ending, a '
                        'checkpoint of TensorFlow')
    parser.add_argument('--backbone-only', action='store_true',
                        help='leave out head, classifier, key encoder and queue')
    parser.add_argument('--fasterrcnn', action='store_true',
                        help="write an .npz for tensorpack's FasterRCNN")
    args = parser.parse_args(argv)
    try:
        depth, kept, dropped = convert(args.src, args.dst, args.backbone_only, args.fasterrcnn)
    except UserError as error:
        sys.exit(f'convert_checkpoint.py: error: {error}')
    for name in dropped:
        print(f'dropped: {name}')
    print(f'{args.dst}: {len(kept)} variables, ResNet-{depth}; {len(dropped)} dropped')


if __name__ == '__main__':
    main()
