"""One file per implementation; the file name is the string a user passes as `implementation=`."""
