def test_x(four):
    import subprocess

    subprocess.run(["ls", "-R", str(four.directory)])
    assert four.reference_calls == 1
