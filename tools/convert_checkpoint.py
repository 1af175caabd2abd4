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
checkpoint of TensorFlow. A file must hold all of a ResNet (18, 34, 50 or 101 layers, any width),
perhaps with a contrastive head or a classifier, or all of MoCo, and nothing else. What DST's format
has no place for is listed.

detectron2 has to be told INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN [123.675, 116.28, 103.53],
MODEL.PIXEL_STD [58.395, 57.12, 57.375] and MODEL.RESNETS.STRIDE_IN_1X1 False. tensorpack's
FasterRCNN takes BGR, as the weights here do.
"""
import argparse
import collections
import json
import os
import pickle
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import checkpoints  # noqa: E402
from checkpoints import WeightsError  # noqa: E402


def describe(weights):
    """What the names of weights say that they are.

    Args:
        weights: dict of our name -> array, perhaps not complete.

    Returns:
        (depth, dict): of the ResNet whose names are the most similar; our name -> shape of all that
        weights with the same parts hold.
    """
    stem = weights.get('conv0/W', np.empty(0))
    kernel, _, _, width = stem.shape if stem.ndim == 4 else (7, 7, 3, 64)
    names = set(filter(checkpoints.is_backbone, weights))
    depth = min(checkpoints.DEPTHS, key=lambda depth: len(
        names ^ {v.ours for v in checkpoints.list_variables(depth)}))
    variables = checkpoints.list_variables(depth, width, kernel)
    shapes = {v.ours: v.shape for v in variables}
    dim = variables[-1].shape[-1]  # D

    is_moco = any(name.startswith(('momentum_encoder/', 'queue')) for name in weights)
    if any(name.startswith('linear/') for name in weights) and not is_moco:
        classes = np.shape(weights.get('linear/b'))[0:1] or (1000,)
        shapes.update({'linear/W': (dim,) + classes, 'linear/b': classes})
    for i, out in enumerate(checkpoints.head_dims(weights) or ([128] if is_moco else [])):
        layer = 'linear{}_{}'.format(i, out)
        shapes.update({layer + '/W': (dim, out), layer + '/b': (out,)})
        dim = out
    if is_moco:
        shapes.update({'momentum_encoder/' + name: shape for name, shape in shapes.items()})
        keys = np.shape(weights.get('queue'))[0:1] or (65536,)
        shapes.update(queue=keys + (dim,), queue_ptr=())
    return depth, shapes


def convert(src, dst, backbone_only=False, fasterrcnn=False):
    """Convert a file of weights.

    Args:
        src: as in checkpoints.find_checkpoint().
        dst: file to write; its ending says how.
        backbone_only: leave out head, classifier, key encoder and queue.
        fasterrcnn: write the names of tensorpack's FasterRCNN; `dst` must be an .npz.

    Returns:
        (depth, kept, dropped): of the ResNet; our names that dst has; what it has no place for.

    Raises:
        WeightsError: src is not, or does not hold what it should; dst cannot be written.
    """
    write, takes = tell_writer(dst, backbone_only, fasterrcnn)
    src = checkpoints.find_checkpoint(src)
    if os.path.realpath(src) == os.path.realpath(dst):
        raise WeightsError('{}: is what would be read and written'.format(src))
    weights, dropped = checkpoints.read(src, checkpoints.is_model)
    depth, shapes = describe(weights)
    problems = checkpoints.compare(weights, shapes)
    if problems:
        raise WeightsError('{}: is not all of {} on a ResNet-{}, and nothing else:\n  {}'.format(
            src, 'MoCo' if 'queue' in shapes else 'one network', depth, '\n  '.join(problems)))
    if write is write_moco and 'queue' not in weights:
        raise WeightsError('{}: has no key encoder and queue, which a .pth.tar of MoCo holds; '
                           'write a .pth instead of {}'.format(src, dst))

    kept = {name: array for name, array in weights.items() if takes(name)}
    try:
        os.makedirs(os.path.dirname(dst) or '.', exist_ok=True)
        write(kept, dst, depth)
    except (OSError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
        raise WeightsError('{}: cannot be written: {}'.format(dst, error))
    return depth, sorted(kept), sorted(set(weights) - set(kept)) + sorted(dropped)


def tell_writer(dst, backbone_only, fasterrcnn):
    """How to write a file of this name.

    Returns:
        A function of dict of our name -> array, path and depth; and a predicate on our names that
        have a place in the file.
    """
    def everything(name):
        return True

    def classifier(name):
        return checkpoints.is_backbone(name) or name.startswith('linear/')

    writers = collections.OrderedDict([
        ('.npz', (write_npz, everything)), ('.pth.tar', (write_moco, everything)),
        ('.pth', (write_torchvision, classifier)), ('.pt', (write_torchvision, classifier)),
        ('.pkl', (write_detectron2, checkpoints.is_backbone)),
        ('', (write_tensorflow, everything))])
    if os.path.isdir(dst) or not os.path.basename(dst):
        raise WeightsError('{}: is a folder; name the checkpoint too, {} say'.format(
            dst, os.path.join(dst, 'model-0')))
    ending = '.pth.tar' if dst.endswith('.pth.tar') else os.path.splitext(dst)[1]
    if ending not in writers:
        raise WeightsError('{}: has none of the endings {}; a checkpoint of TensorFlow has none'
                           .format(dst, ', '.join(filter(None, writers))))
    if fasterrcnn:
        if ending != '.npz':
            raise WeightsError('{}: what --fasterrcnn writes ends in .npz'.format(dst))
        return write_fasterrcnn, checkpoints.is_backbone
    write, takes = writers[ending]
    if backbone_only:
        if write is write_moco:
            raise WeightsError('{}: --backbone-only leaves nothing to call MoCo; write a .pth'
                               .format(dst))
        takes = checkpoints.is_backbone
    return write, takes


def write_npz(weights, path, depth):
    np.savez(path, **weights)


def write_fasterrcnn(weights, path, depth):
    names = {v.ours: v.fasterrcnn for v in checkpoints.list_variables()}
    np.savez(path, **{names[name]: array for name, array in weights.items()})


def write_detectron2(weights, path, depth):
    names = {v.ours: v.detectron2 for v in checkpoints.list_variables()}
    model = {names[name]: checkpoints.to_pytorch(name, array) for name, array in weights.items()}
    with open(path, 'wb') as f:
        pickle.dump({'model': model, '__author__': 'MoCo', 'matching_heuristics': True}, f)


def write_torchvision(weights, path, depth):
    save_pytorch(weights, checkpoints.classifier_names(), lambda state: state, path)


def write_moco(weights, path, depth):
    names = checkpoints.moco_names(checkpoints.head_dims(weights))
    save_pytorch(weights, {ours: 'module.' + theirs for ours, theirs in names.items()},
                 lambda state: {'arch': 'resnet{}'.format(depth), 'state_dict': state}, path)


def save_pytorch(weights, names, wrap, path):
    torch = checkpoints.import_pytorch('writing', path)
    state = collections.OrderedDict(
        (names[name], torch.from_numpy(checkpoints.to_pytorch(name, array)))
        for name, array in weights.items())
    torch.save(wrap(state), path)


def write_tensorflow(weights, path, depth):
    """Write a checkpoint, and the file `checkpoint` that makes its folder mean it."""
    tf = checkpoints.import_tensorflow('writing', path)
    folder = os.path.dirname(path) or '.'
    latest = tf.train.latest_checkpoint(folder)
    if latest is not None and os.path.realpath(latest) != os.path.realpath(path):
        raise WeightsError('{}: this folder holds {} already, of another run perhaps'.format(
            path, os.path.basename(latest)))
    # the op behind tf.train.Saver: variables and a graph of them would take seconds
    with tf.Graph().as_default(), tf.Session(
            config=tf.ConfigProto(device_count={'GPU': 0})) as sess:
        tensors = [tf.placeholder(array.dtype, array.shape) for array in weights.values()]
        save = tf.raw_ops.SaveV2(prefix=path, tensor_names=list(weights),
                                 shape_and_slices=[''] * len(weights), tensors=tensors)
        try:
            sess.run(save, dict(zip(tensors, weights.values())))
        except tf.errors.OpError as error:
            raise OSError(checkpoints.tell_error(error))
    with open(os.path.join(folder, 'checkpoint'), 'w') as f:  # so that the folder can be moved
        f.write('model_checkpoint_path: {}\n'.format(json.dumps(os.path.basename(path))))


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
                        help='write an .npz for tensorpack\'s FasterRCNN')
    args = parser.parse_args(argv)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # TensorFlow's chatter
    try:
        depth, kept, dropped = convert(args.src, args.dst, args.backbone_only, args.fasterrcnn)
    except WeightsError as error:
        sys.exit('convert_checkpoint.py: error: {}'.format(error))
    for name in dropped:
        print('dropped: {}'.format(name))
    print('{}: {} variables, ResNet-{}; {} dropped'.format(
        args.dst, len(kept), depth, len(dropped)))


if __name__ == '__main__':
    main()
