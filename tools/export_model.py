"""The backbone for programs of others, ONNX and SavedModel: RGB images of any size, 0..255
[N, H, W, 3], to features float32 [N, D]. Channels are reordered and normalised inside."""
import json
import os
import tempfile

import numpy as np

import resnet
from errors import UserError, one_line
from tools import pytorch_format

MARK = b'export_model.py of MoCo'  # what every ONNX file names as its producer


def settle(path, arrays, depth, text, stem):
    """What the network of a backbone is, as `text` says (saved with it, or None) or as published:
    (dict, resnet.ResNet). A UserError if the stem is not known, or is not `stem` (or None)."""
    kernel, _, _, width = arrays['conv0/W'].shape
    fitting = [name for name, (size, _, _) in resnet.STEMS.items() if size == kernel]
    network = {'mean_bgr': resnet.MEAN_BGR.tolist(), 'std_bgr': resnet.STD_BGR.tolist()}
    try:
        network.update(json.loads(text.tobytes().decode()) if text is not None else {})
        colours = {key: np.array(network[key], np.float32).reshape(3) for key in list(network)[:2]}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its 'network' cannot be read: {error}")
    known = network.get('stem') or (fitting[0] if len(fitting) == 1 else stem)
    if known not in fitting:
        raise UserError(f'{path}: its stem is {known or "not told"}; with a first kernel of '
                        f'{kernel}x{kernel} it can be --stem ' + (' or '.join(fitting) or 'none'))
    if stem not in (None, known):
        raise UserError(f'--stem {stem}: the weights of {path} are of --stem {known}')
    network.update(depth=depth, width=width, stem=known)
    return network, resnet.ResNet(depth, width, known, **colours)


def write_onnx(arrays, path, network, net, input_type):
    """Write a file of a backbone; BN is folded into the convolutions."""
    try:
        import onnx
    except ImportError:
        raise UserError('writing ONNX needs onnx: pip install onnx. If this Python cannot have it, '
                        'write an .npz, and convert that with one that has it')
    nodes, constants = [], []

    def add(kind, inputs, name, **attributes):
        nodes.append(onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(array, name):
        array = np.array(array, np.float32, order='C')
        constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def convolve(x, conv, scope=''):  # [N, C, H, W]
        name = scope + conv.name
        gamma, beta, mean, variance = (arrays[f'{name}_bn/{end}'].astype(np.float64)
                                       for end in ('gamma', 'beta', 'mean/EMA', 'variance/EMA'))
        scale = gamma / np.sqrt(variance + resnet.BN_EPSILON)
        kernel = pytorch_format.to_pytorch(name + '/W', arrays[name + '/W'])  # OIHW, of RGB
        return add('Conv', [x, constant(kernel * scale[:, None, None, None], name + '/W'),
                            constant(beta - mean * scale, name + '/b')], name,
                   strides=[conv.stride] * 2, pads=[conv.kernel // 2] * 4)

    def relu(x):
        return add('Relu', [x], x + '/relu')

    x = add('Cast', ['images'], 'float', to=onnx.TensorProto.FLOAT)  # [N, H, W, 3]
    x = add('Sub', [x, constant(net.mean_bgr[::-1], 'mean_rgb')], 'centred')
    x = add('Div', [x, constant(net.std_bgr[::-1], 'std_rgb')], 'normalised')
    x = add('Transpose', [x], 'transposed', perm=[0, 3, 1, 2])  # [N, 3, H, W]
    x = relu(convolve(x, net.conv0))
    if net.has_pool:
        x = add('MaxPool', [x], 'pool', kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for block in net.blocks:
        scope = block.name + '/'
        shortcut = convolve(x, block.shortcut, scope) if block.shortcut else x
        *inner, last = block.convs
        for conv in inner:
            x = relu(convolve(x, conv, scope))
        x = relu(add('Add', [convolve(x, last, scope), shortcut], scope + 'sum'))
    x = add('GlobalAveragePool', [x], 'average')  # [N, D, 1, 1]
    add('Flatten', [x], 'features')  # [N, D]

    types, describe = onnx.TensorProto, onnx.helper.make_tensor_value_info
    images = describe('images', getattr(types, input_type.upper()), ['N', 'H', 'W', 3])
    features = describe('features', types.FLOAT, ['N', net.feature_dim])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, 'backbone', [images], [features], constants),
        producer_name=MARK.decode(), doc_string=__doc__,
        ir_version=7, opset_imports=[onnx.helper.make_opsetid('', 13)])  # both of onnx 1.8
    onnx.helper.set_model_props(model, {'network': json.dumps(network)})
    onnx.save(model, path)


def write_saved_model(arrays, path, network, net, input_type):
    """Write a folder of a backbone, whole or not at all."""
    tf = resnet.tf
    if tf is None:
        raise UserError('writing a SavedModel needs TensorFlow and Tensorpack')
    import runs
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or '.', prefix='.') as folder, \
            tf.Graph().as_default(), tf.Session(
                config=tf.ConfigProto(device_count={'GPU': 0})) as sess:
        images = tf.placeholder(input_type, [None, None, None, 3], 'images')
        features = tf.identity(net(images[..., ::-1], training=False), 'features')
        runs.assign(sess, arrays)
        builder = tf.saved_model.Builder(os.path.join(folder, 'model'))
        try:
            builder.add_meta_graph_and_variables(
                sess, ['serve'], {'serving_default': tf.saved_model.predict_signature_def(
                    {'images': images}, {'features': features})}, strip_default_attrs=True)
            builder.save()
        except tf.errors.OpError as error:
            raise OSError(one_line(error))
        os.sync()
        os.rename(os.path.join(folder, 'model'), path)
