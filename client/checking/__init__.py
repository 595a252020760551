"""What an engineer asks before a site takes part: is everything in order, and what exactly would leave?"""
