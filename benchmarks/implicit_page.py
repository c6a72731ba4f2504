def write_page(records, target):
    (target / "implicit.md").write_text(str(len(records)))
