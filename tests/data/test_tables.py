import pytest

from asit_hf.data.tables import read_table

ROWS = [["a.wav", "dog"], ["b.wav", "cat"]]


def write(folder, content, name="t.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.CSV"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_any_delimiter_with_any_extension(tmp_path, name, delimiter, caplog):
    lines = [["file", "label"], ["a.wav", "dog"], ["b.wav", "cat"]]
    table = read_table(write(tmp_path, "\n".join(map(delimiter.join, lines)), name))
    assert (table.names, table.rows) == (["file", "label"], ROWS)
    usual = {"csv": ",", "tsv": "\t"}.get(name[2:].lower(), delimiter)
    assert (name in caplog.text) == (delimiter != usual)


@pytest.mark.parametrize(
    "text",
    [
        "file,label\r\na.wav,dog\r\nb.wav,cat\r\n",
        "file,label\ra.wav,dog\rb.wav,cat\r",
        " file ,label\t\na.wav , dog\n b.wav,cat \n",
        '"file","label"\n"a.wav", "dog"\n"b.wav" ,"cat"\n',
        "\n\nfile,label\n\na.wav,dog\n , \nb.wav,cat\n,\n\n",
        "file,label,,\na.wav,dog,,\nb.wav,cat\n",  # empty columns of a spreadsheet
        'sep=;\nfile;label\na.wav;dog\nb.wav;cat\n',
    ],
)  # fmt: skip
def test_forgiven_irregularities(tmp_path, text):
    table = read_table(write(tmp_path, text))
    assert (table.names, table.rows) == (["file", "label"], ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_encodings(tmp_path, encoding, caplog):
    path = write(tmp_path, "file;label\nhühner.wav;käuzchen\n", encoding=encoding)
    assert read_table(path).rows == [["hühner.wav", "käuzchen"]]
    assert ("Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_the_delimiter_is_checked_against_the_rows(tmp_path):
    text = "file;label (dog, cat)\na.wav;dog\n"  # a comma divides the header too
    assert read_table(write(tmp_path, text)).names == ["file", "label (dog, cat)"]
    assert read_table(write(tmp_path, "file\nSmith; a.wav\n")).rows == [["Smith; a.wav"]]
    assert read_table(write(tmp_path, 'file,label\na.wav,"x;y, z"\n')).rows == [["a.wav", "x;y, z"]]


def test_lines_of_rows(tmp_path):
    table = read_table(write(tmp_path, 'file,text\n\na.wav,"two\nlines"\nb.wav,one\n'))
    assert table.column("text") == ["two\nlines", "one"]
    assert table.lines == [3, 5]
    assert table.place(1) == f"line 5 of {tmp_path / 't.csv'}"


def test_quotes_of_a_table_with_tabs_may_be_characters(tmp_path):
    table = read_table(write(tmp_path, 'file\ttext\na.wav\t"Come," she said\nb.wav\t"so"\n', "t.tsv"))
    assert table.rows == [["a.wav", '"Come," she said'], ["b.wav", "so"]]


def test_without_a_header(tmp_path):
    text = '# id, start, end, labels\nx, 30.0, 40.0, "/m/1,/m/2"\n\ny, 0\n'
    table = read_table(write(tmp_path, text), header=False, comment="#")
    assert (table.names, table.rows, table.lines) == ([], [["x", "30.0", "40.0", "/m/1,/m/2"], ["y", "0"]], [2, 4])


def test_short_rows_are_filled_on_request(tmp_path):
    path = write(tmp_path, "file\tonset\tlabel\na.wav\nb.wav\t1\tdog\n", "t.tsv")
    assert read_table(path, fill=True).rows == [["a.wav", "", ""], ["b.wav", "1", "dog"]]
    with pytest.raises(ValueError, match=r"expected 3 cells .* got 1 in line 2 of .*t\.tsv"):
        read_table(path)


@pytest.mark.parametrize("text", ["", "\n \n", "file,label\n"])
def test_tables_without_rows(tmp_path, text):
    table = read_table(write(tmp_path, text))
    assert (table.rows, table.names) == ([], ["file", "label"] if "file" in text else [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,label\nx,y,z\n", ["2 cells", "got 3", "line 2"]),
        ("file\nx,y\n", ["got 2", "line 2"]),
        ("file,label,label\na,b,c\n", ["'label'", "first row"]),
        ('file,label\na.wav,"dog\nb.wav,cat\n', ["line 2"]),
        ('file,label\na.wav,"dog\nb.wav,cat\nc.wav,"x"\n', ["line 2"]),
        (b"PK\x03\x04\x14\x00\x06\xff", ["Excel"]),
        (b"PAR1\x15\x04\x15\xff", ["parquet"]),
        ("file,label\n".encode("utf-16-le"), ["text"]),  # without a byte order mark
        ("file,label\n".encode("utf-16")[:-1], ["utf-16"]),
        (b"file,label\na.wav,\x81\xff\n", ["UTF-8"]),
    ],
)
def test_errors_name_the_file(tmp_path, content, words):
    with pytest.raises(ValueError) as error:
        read_table(write(tmp_path, content))
    assert not isinstance(error.value, UnicodeDecodeError)
    assert all(word in str(error.value) for word in [*words, "t.csv"])
