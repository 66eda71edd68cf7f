"""A fake of Automatic1111's, Forge's and Classic's modules: no host, but their traps, each by name.

CI can't have these hosts: no package index carries them. What is here answers as they do where the
extension asks, over a small U-Net of ComfyUI's own class, which has the same keys as theirs:

1. ``sys.path`` is replaced while a script loads (``loading.py``).
2. Forge has a ``FakeInitialModel`` until ``forge_model_reload()``.
3. Forge's ``Linear`` is no ``nn.Linear``.
4. Forge's blocks add in place.
5. Forge's weights are inference tensors; A1111's are normal ones that want gradients.
6. An exception in Forge's main thread comes back as None.
7. The last prompt's LoRAs stay merged in the weights.
8. A batch of prompts is padded to the longest.
9. Progress and stop are flags of ``shared.state``; work waits for ``call_queue.queue_lock``.
10. A network's own checkpointing is there, and would lose the gradient of an edit.
"""
