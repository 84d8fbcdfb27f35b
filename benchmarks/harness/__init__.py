"""What every benchmark needs: a quiet machine, sides in turn, processes started by hand, a result that can be read again."""
