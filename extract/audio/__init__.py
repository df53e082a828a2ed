"""Any file that FFmpeg decodes, whole or a part of it -> 16 kHz mono, the samples that Whisper's own loader gives."""

SAMPLE_RATE = 16000  # Hz, of all decoded audio
