from tests.hf.converted.conftest import ids, make_source, save_source

__all__ = ["ids", "make_source", "save_source"]
