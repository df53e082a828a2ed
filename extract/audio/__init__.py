"""Any file that FFmpeg decodes, whole or a part of it -> 16 kHz mono float32, as Whisper's own loader gives it."""
