"""What tests share: small worlds of stages, servers, several processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
