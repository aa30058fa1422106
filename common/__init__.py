"""The data flow of the suite, one module per arrow.

image, caption ─ dataset ─▶ Sample ─ caching ─▶ Batch(moments, text, time_ids) ─ noise ─▶ x_t, target
     (loading: VAE and text encoders are on the GPU only while they encode)                 │
                                                                                            ▼
images ◀─ sampling ◀─ adapter file ◀─ checkpoint ◀─ loops ◀─ engine: unet ─▶ loss ─▶ flat gradient ─▶ optimizer ─▶ EMA
                                                               (adapters: LoRA layers, the flat parameter buffer)
"""
