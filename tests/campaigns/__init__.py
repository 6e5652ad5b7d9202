"""Long runs, no tests of every day: started by hand, they print what they counted."""
